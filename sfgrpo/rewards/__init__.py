"""Rewards by name, and their weighted sum."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sfgrpo.names import REWARD, OwnError, blaming_own, unknown_name
from sfgrpo.prompts import Prompt
from sfgrpo.rewards._calls import Calls, Failure, counted
from sfgrpo.rewards._weights import unreadable
from sfgrpo.rewards.base import SOUND, Metadata, Reward, RewardError, Sound, final_only, staying

__all__ = [
    "Calls", "Failure", "Metadata", "Mixture", "Reward", "RewardError", "Sound", "available",
    "build", "evenly", "final_only", "load", "of_final_images",
]  # fmt: skip

CHUNK = 64
"""At most so many frames of videos go into a reward of images at once."""


def available() -> list[str]:
    """Names of the rewards in this package, one per module."""
    return REWARD.names()


def build(name: str, **options: Any) -> Reward:
    """The reward `name`: a module of this package, or "package.module:function" of one's own.

    The function is called with `options` and returns a `Reward`.

    Raises:
        ValueError: no reward of this name; an option that it does not have, or lacks one it needs;
            what it returns cannot score.
        OSError: a file or weights that are not there; names the option where it is known.
    """
    function = REWARD.bind(name, options)
    try:
        with blaming_own(name, OwnError, f"reward '{name}' failed"):
            made = function()
    except OSError as error:
        raise OSError(unreadable(name, options, error)) from error
    if not callable(made):
        raise ValueError(
            f"reward '{name}' returned a {type(made).__name__}, which cannot be called with "
            f"({', '.join(REWARD.made)})"
        )
    return cast(Reward, made)


def of_final_images(names: Iterable[str], asked: Collection[str] = ()) -> frozenset[str]:
    """The rewards that score final images alone: those that say so (`final_only`), and those of
    which it is `asked`. None of them is built.

    Raises:
        ValueError: no reward of this name, or its module cannot be imported.
    """
    return frozenset(
        name for name in names
        if name in asked or getattr(REWARD.resolve(name), "final_only", False)
    )  # fmt: skip


def evenly(count: int, available: int) -> list[int]:
    """`count` of `available` frames, evenly spread, the first and the last among them.

    All of them if there are no more; of a single one, the one in the middle.
    """
    if count >= available:
        return list(range(available))
    if count == 1:
        return [available // 2]
    gaps = count - 1
    return [(2 * i * (available - 1) + gaps) // (2 * gaps) for i in range(count)]


class Mixture:
    """Weighted sum of rewards; the weights are used as given, not normalised. How several are
    credited is another matter (`sfgrpo.credit.mixtures`).

    Of a video, a reward with the attribute `takes_video = True` sees all; any other sees `frames`
    images of it, evenly spread, and its score of the video is the mean of theirs.

    Each reward gets copies of its own. A tensor's version would tell without a copy whether one
    wrote into its images, but not where it wrote through NumPy or a kernel, and then what the other
    rewards, the judges and the pictures see would change in silence.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], *, frames: int = 8,
        final_only: Collection[str] = (), calls: Calls | None = None,
    ) -> None:  # fmt: skip
        """`calls` says what becomes of a call that fails; by default it raises."""
        if not weights:
            raise ValueError("a mixture needs at least one reward")
        if set(rewards) != set(weights):
            raise ValueError(f"rewards {sorted(rewards)} but weights for {sorted(weights)}")
        if frames < 1:
            raise ValueError(f"reward_frames: needs at least 1 frame of a video, got {frames}")
        self.rewards = dict(rewards)
        self.weights = dict(weights)
        self.frames = frames
        self.final_only = frozenset(final_only)
        """The rewards that score final images alone."""
        self.calls = calls or Calls()
        self.takes_sound = [n for n, r in rewards.items() if getattr(r, "takes_sound", False)]
        """The rewards that hear the sound of videos."""

    def check(self, prompts: Sequence[Prompt], *, heard: bool = False) -> None:
        """Let the rewards that can (`Reward.check`) look at all prompts, before a run begins.

        Args:
            heard: whether the samples will come with sound.

        Raises:
            ValueError: the file and line of the first prompt that a reward cannot score, and why;
                a reward takes sound where there is none.
            ConnectionError: a reward's server cannot be asked.
        """
        if self.takes_sound and not heard:
            raise ValueError(
                f"reward '{self.takes_sound[0]}' takes sound, and this model.backbone makes none"
            )
        for name, reward in self.rewards.items():
            checks = getattr(reward, "check", None)
            if checks is None:
                continue
            why = _refusal(name, checks, prompts)
            if why is None:
                continue
            sound, refused = 0, len(prompts)  # so many prompts from the first are, and are not
            while refused - sound > 1:
                middle = (sound + refused) // 2
                if _refusal(name, checks, prompts[:middle]):
                    refused = middle
                else:
                    sound = middle
            first = prompts[refused - 1]
            if alone := _refusal(name, checks, [first]):
                raise ValueError(f"{first.where or f'prompt {first.text!r}'}: {alone}")
            raise ValueError(why)

    @torch.no_grad()
    def __call__(
        self,
        samples: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        where: Sequence[str] = (),
        finite: bool = True,
        final: Tensor | None = None,
        sounds: Sequence[Sound] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total [B] float32 and every reward's own scores [B] float32, on the CPU.

        `samples` are images [B, 3, H, W], videos [B, F, 3, H, W], or what else a generator makes
        ([B, T, D] of robot actions), which rewards get as it is.

        A sample that is not finite itself scores nan, whatever a reward makes of it (a reward sees
        zeros in its place). `where` says in which file and line each prompt stands, if that is
        known; `final`, bool [B], which samples are final images, if not all of them are: the others
        are not shown to rewards of final images alone, which give them 0; `sounds` what is heard
        with each sample, for the rewards that take it.

        Raises:
            ValueError: the lengths differ, or a score is not finite (the message names the reward;
                `finite=False` passes such values on).
            RewardError: a reward raises (the message names the reward, the prompt and where it
                stands), returns another shape or what is no numbers, or calls sys.exit; unless
                `calls` says otherwise.
        """
        if not len(samples) == len(prompts) == len(metadata):
            raise ValueError(
                f"{counted(samples)}, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        places = where or [""] * len(prompts)
        asked = [
            Prompt(text, dict(entry), place)
            for text, entry, place in zip(prompts, metadata, places, strict=True)
        ]
        broken = ~samples.detach().isfinite()[..., None].flatten(1).all(1)
        shown = samples.detach()
        if broken.any():
            shown = shown.clone()
            shown[broken] = 0
        scores: dict[str, Tensor] = {}
        everything = torch.ones(len(samples), dtype=torch.bool, device="cpu")
        for name in self.rewards:
            sees = everything if final is None or name not in self.final_only else final.cpu()
            told = _with_sounds(name, asked, sounds) if name in self.takes_sound else asked
            score = self._of_those(sees, name, shown, told)
            score[broken.cpu() & sees] = torch.nan
            if finite and not torch.isfinite(score).all():
                bad = int((~torch.isfinite(score)).nonzero()[0])
                raise ValueError(f"reward {name!r} is {score[bad]} for prompt {prompts[bad]!r}")
            scores[name] = score
        total = torch.zeros(len(samples), dtype=torch.float32, device="cpu")
        for name, score in scores.items():
            total += self.weights[name] * score
        return total, scores

    def _of_those(self, sees: Tensor, name: str, shown: Tensor, asked: Sequence[Prompt]) -> Tensor:
        """One reward's scores [B] of the samples that it `sees`, bool [B], and 0 for the others."""
        score = torch.zeros(len(sees), dtype=torch.float32, device="cpu")
        if len(sees) and not sees.any():
            return score
        of_frames = shown.ndim == 5 and not getattr(self.rewards[name], "takes_video", False)
        samples = shown[sees.to(shown.device)]  # a copy
        texts = [prompt for prompt, seen in zip(asked, sees.tolist(), strict=True) if seen]
        if of_frames:
            score[sees] = self._of_frames(name, samples, texts)
        else:
            score[sees] = self.calls.score(name, self.rewards[name], samples, texts)
        return score

    def _of_frames(self, name: str, videos: Tensor, asked: Sequence[Prompt]) -> Tensor:
        """The mean of one reward over the frames of each video, [B]."""
        if not videos.shape[1]:
            raise ValueError(f"videos without frames: {tuple(videos.shape)}")
        shown = evenly(self.frames, videos.shape[1])
        where = [(row, frame) for row in range(len(videos)) for frame in shown]
        found = [torch.empty(0, dtype=torch.float32, device="cpu")]
        for start in range(0, len(where), CHUNK):
            part = where[start : start + CHUNK]
            rows, frames = [row for row, _ in part], [frame for _, frame in part]
            images = videos[rows, frames]  # a copy
            found.append(
                self.calls.score(name, self.rewards[name], images, [asked[row] for row in rows])
            )
        return torch.cat(found).unflatten(0, (len(videos), len(shown))).mean(1)


def _with_sounds(
    name: str, asked: Sequence[Prompt], sounds: Sequence[Sound] | None
) -> list[Prompt]:
    """Each sample's prompt with its sound among the metadata."""
    if sounds is None:
        raise RewardError(f"reward {name!r} takes sound, and the samples come without any")
    return [
        dataclasses.replace(prompt, metadata={**prompt.metadata, SOUND: sound})
        for prompt, sound in zip(asked, sounds, strict=True)
    ]


def _refusal(
    name: str, checks: Callable[[list[str], list[Metadata]], None], prompts: Sequence[Prompt]
) -> str | None:
    """What a reward's check says against these prompts; None if nothing."""
    try:
        with staying(f"reward {name!r}"):
            checks([p.text for p in prompts], [copy.deepcopy(p.metadata) for p in prompts])
    except ConnectionError as error:  # no prompt's fault
        raise ConnectionError(f"reward {name!r}: {error}") from error
    except Exception as error:  # a reward of one's own raises what it likes
        message = str(error.args[0]) if len(error.args) == 1 else str(error)
        if " " not in message:  # as in KeyError("text")
            message = f"{type(error).__name__} {message}"
        return message if message.startswith("reward ") else f"reward {name!r}: {message}"
    return None


def load(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    frames: int = 8,
    final_only: Collection[str] = (),
    calls: Calls | None = None,
) -> Mixture:
    """The mixture of the named rewards, e.g. `load({"ocr": 0.8, "colour": 0.2})`.

    `options` maps a reward's name to the arguments of its `build`, `frames` is how many frames of a
    video a reward of images sees, `final_only` names rewards that score final images alone, beside
    those that say so, `calls` says what becomes of a call that fails. ValueError for options of a
    reward that has no weight, or that it does not have.
    """
    given = dict(options or {})
    for name in given:
        if name not in weights:
            raise ValueError(unknown_name("reward in options", name, weights))
    built = {name: build(name, **given.get(name, {})) for name in weights}
    finals = of_final_images(weights, final_only)
    for name, reward in built.items():
        if getattr(reward, "final_only", False) and name not in finals:
            raise ValueError(
                f"reward '{name}': what it returns says final_only, which must be known before it "
                "is built: decorate the function with sfgrpo.rewards.final_only, too"
            )
    return Mixture(built, weights, frames=frames, final_only=finals, calls=calls)
