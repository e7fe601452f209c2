"""Signs that a reward is being exploited, measured on the images of every evaluation.

A policy that is rewarded long enough finds what the reward overlooks: the same picture for every
noise, garish or black surfaces, checkerboards, a drift away from everything the model could draw.
None of these is in the reward, all of them show in the pixels. Each sign has a threshold that
follows from the run's own first evaluation, and is told once, when it crosses.

Judges have no better or worse by themselves. Where a judge says which way is better (`better`), a
number that gets worse while the reward rises is a sign, too.

Credit can be exploited like a reward: a policy may come to move where a coarse solver cannot follow
it, and then its steps are credited with the solver's error. Estimates of states with much noise and
with little have nearly the same mean reward as long as they follow the ODE, and that shows in the
metrics (`estimates`). Errors that leave the means alone do not: `sfgrpo probe RUN` finds those.

Shapes: P prompts, N images of each; strips of a video's frames are images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
Row = Mapping[str, Any]
"""A line of eval.jsonl."""

DARK = 0.05
"""Luminance below which a pixel is dark; 1 is white."""
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue (Rec. 601)."""
PARTED = 0.2
"""A judge has parted from the reward when it is worse by this share of its first value."""
JUDGE = "judge_"
"""How the names of judges begin among the signs."""
ESTIMATES = "estimates"
"""The name among the signs of how far clean estimates have parted from the finished samples."""
LAST, LEAST = 20, 5
"""Iterations that it is a mean over: at most, at least. In one alone groups differ too much."""


@dataclass(frozen=True)
class Alarm:
    """A sign and when it is an alarm."""

    title: str
    about: str
    """What one sees in it."""
    limit: Callable[[Mapping[str, float]], float]
    """The threshold, from the signs of the first evaluation."""
    below: bool = False
    """Whether it is crossed downwards."""

    def crossed(self, value: float, first: Mapping[str, float]) -> bool:
        """Whether a value is beyond the threshold."""
        limit = self.limit(first)
        return value < limit if self.below else value > limit


ALARMS: dict[str, Alarm] = {
    "diversity": Alarm(
        "Diversity",
        "Root mean square distance of two images of one prompt. Below half of where it began, every"
        " noise leads to nearly the same image.",
        lambda first: first["diversity"] / 2, below=True,
    ),
    "saturation": Alarm(
        "Saturation",
        "Mean distance of a pixel's largest and smallest colour. Above one and a half times where "
        "it began, colours have become garish.",
        lambda first: min(1.0, 1.5 * first["saturation"]),
    ),
    "dark_pixels": Alarm(
        "Dark pixels",
        f"Share of pixels with a luminance below {DARK:g}. A fifth more of the image than at the "
        "start: black surfaces are taking over.",
        lambda first: first["dark_pixels"] + 0.2,
    ),
    "high_frequency": Alarm(
        "High-frequency energy",
        "What a pixel's four neighbours do not explain of it, as a share of the variance. Twice "
        "that of the start: noise, grain or checkerboards.",
        lambda first: 2 * first["high_frequency"],
    ),
    "distance_to_start": Alarm(
        "Distance to the start",
        "Root mean square distance of an image to that of the same prompt and noise before "
        "training. Beyond the first diversity an image has no more to do with what it was than with"
        " any other image of its prompt.",
        lambda first: first["diversity"],
    ),
}  # fmt: skip


OF_ESTIMATES = Alarm(
    "Clean estimates part from the samples",
    "How far the mean reward of a state's clean estimates is from that of the finished samples, in "
    "standard deviations within groups, at the state that is farthest off. Above one and a half "
    "the solver no longer follows the policy, and steps are credited with its error: a solver of "
    "more substeps does (credit.solver: euler or exact).",
    lambda _: 1.5,
)


def alarm(name: str) -> Alarm:
    """The alarm of a sign; of a judge's, one for all."""
    if name == ESTIMATES:
        return OF_ESTIMATES
    if name in ALARMS:
        return ALARMS[name]
    return Alarm(
        f"{name.removeprefix(JUDGE).replace('_', ' ')} parts from the reward",
        "By what share of its first value the judge is worse, while the reward is better than at "
        "the start.",
        lambda _: PARTED,
    )


def better(**directions: Literal["higher", "lower"]) -> Callable[[F], F]:
    """Say of a judge's numbers which way is better:

        @better(diversity="higher", distance_to_real="lower")
        def judge(images, metadata): ...

    Raises:
        ValueError: a direction is neither.
    """
    for name, direction in directions.items():
        if direction not in ("higher", "lower"):
            raise ValueError(f"better: '{name}' must be 'higher' or 'lower', got {direction!r}")

    def mark(judge: F) -> F:
        judge.better = directions  # pyright: ignore[reportFunctionMemberAccess]
        return judge

    return mark


def signs(images_PN: np.ndarray, first_PN: np.ndarray | None) -> dict[str, float]:
    """The signs of an evaluation's images, uint8 `[P, N, 3, H, W]`.

    `first_PN` are those of the first evaluation, the same prompts and noise; None where they are
    gone, and then there is no distance to them. A prompt at a time, so that large images fit.
    """
    rows = [
        _of_prompt(images, None if first_PN is None else first_PN[k])
        for k, images in enumerate(images_PN)
    ]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    high, variance = means.pop("residual"), means.pop("variance")
    return {**means, "high_frequency": high / variance if variance else 0.0}


def _of_prompt(images_N: np.ndarray, first_N: np.ndarray | None) -> dict[str, float]:
    """Sums of one prompt's images `[N, 3, H, W]`."""
    x = images_N.astype(np.float32) / 255
    pairs = [_distance(x[i], x[j]) for i in range(len(x)) for j in range(i)]
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    found = {
        "diversity": float(np.mean(pairs)) if pairs else 0.0,
        "saturation": float((x.max(1) - x.min(1)).mean()),
        "dark_pixels": float((np.einsum("nchw,c->nhw", x, LUMINANCE) < DARK).mean()),
        "residual": float(np.square(inner - around / 4).mean()) if inner.size else 0.0,
        "variance": float(x.var((2, 3)).mean()),
    }
    if first_N is not None:
        start = first_N.astype(np.float32) / 255
        found["distance_to_start"] = float(np.mean([*map(_distance, x, start)]))
    return found


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


def partings(
    first: Mapping[str, float], now: Mapping[str, float], directions: Mapping[str, str]
) -> dict[str, float]:
    """By what share of its first value each judge is worse while the reward has risen, else 0; of
    judges that say which way is better, and whose first value is not 0."""
    rose = now["reward"] > first["reward"]
    found = {}
    for name, direction in directions.items():
        if name in now and first.get(name):
            lost = (first[name] - now[name]) * (1 if direction == "higher" else -1)
            found[JUDGE + name] = max(0.0, lost / abs(first[name])) if rose else 0.0
    return found


def estimates(rows: Sequence[Row]) -> dict[str, float]:
    """How far clean estimates have parted from the finished samples, by `rows` of metrics.jsonl:
    the mean over the last iterations; nothing where no state but the last was scored, nor of fewer
    iterations than say anything."""
    found = []
    for row in rows[-LAST:]:
        rewards, deviation = row.get("reward_per_state"), row.get("reward_std_in_group")
        if rewards and deviation and any(reward != rewards[-1] for reward in rewards):
            found.append(max(abs(reward - rewards[-1]) for reward in rewards) / deviation)
    return {ESTIMATES: float(np.mean(found))} if len(found) >= LEAST else {}


def crossings(rows: Sequence[Row], row: Row) -> list[str]:
    """What is told of the signs that cross their threshold for the first time in `row`, which
    comes after `rows`."""
    with_signs = [r["alarms"] for r in (*rows, row) if r.get("alarms")]
    told = []
    for name, value in row.get("alarms", {}).items():
        own, known = alarm(name), [r[name] for r in with_signs if name in r]
        beyond = [own.crossed(v, with_signs[0]) for v in known]
        if beyond[-1] and not any(beyond[:-1]):
            told.append(
                f"{own.title}: {value:.3g} in the evaluation after iteration {row['iteration']}, "
                f"threshold {own.limit(with_signs[0]):.3g}, at the start {known[0]:.3g}. "
                f"{own.about}"
            )
    return told
