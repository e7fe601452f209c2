"""The method at a glance: clean estimates of two trajectories with the gains of their steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sfgrpo.report import markup, pictures
from sfgrpo.report.look import COLOURS
from sfgrpo.report.plots import axes_of

Strip = Mapping[str, Any]
"""What `sfgrpo.run.strips` keeps beside the pictures."""
NAMES = "AB"
LEAST = 0.005
"""Smaller gains are shown as 0."""


def section(run: Path) -> str:
    """Of the kept pairs of trajectories the one that tells most; nothing if the run kept none."""
    kept = [(json.loads(path.read_text(encoding="utf-8")), path) for path in _strips(run)]
    if not kept:
        return ""
    strip, path = max(kept, key=lambda found: found[0]["contrast"])
    with Image.open(path.with_suffix(".png")) as grid:
        pixels = np.asarray(grid)
    rows = np.split(pixels, len(strip["rewards"]))
    gains = [np.diff(rewards) for rewards in strip["rewards"]]
    most = max(float(np.abs(gain).max()) for gain in gains) or 1.0
    films = [
        _film(strip, name, row, gain, rewards, most)
        for name, row, gain, rewards in zip(NAMES, rows, gains, strip["rewards"], strict=False)
    ]
    curve = markup.figure(
        rewards(strip), "The reward of each clean estimate",
        "Uniform credit looks at the last points alone and gives every step of a trajectory the "
        "same. Stepwise credit gives each step the slope of its line.",
    )  # fmt: skip
    return markup.section(
        "method", "The method at a glance",
        f"Sampling \"{strip['prompt'][:200]}\" in iteration {int(path.stem)}. Each picture is the "
        "clean estimate of a state: the image it would become if no more noise were drawn. Its "
        "reward is known at every state, so a step is credited with its gain, the bar above.",
        *films, markup.cards([curve, _reading(strip, gains)]),
    )  # fmt: skip


def _reading(strip: Strip, gains: Sequence[np.ndarray]) -> str:
    """What the pictures say, in words."""
    told = [
        f"In trajectory {name} the largest gain, {gain.max():+.2f}, is that of the way from state "
        f"{strip['states'][k]} to {strip['states'][k + 1]}."
        for name, gain in zip(NAMES, gains, strict=False)
        if gain[k := int(gain.argmax())] >= LEAST
    ]
    ends = [line[-1] for line in strip["rewards"]]
    if len(ends) > 1:
        told.append(
            f"Both start from the same noise and end {abs(ends[0] - ends[1]):.3f} apart: whoever "
            "sees the final rewards alone holds all their steps for equally good."
        )
    told.append(
        "Gains add up to the final reward minus the first, so nothing is credited twice; what a "
        "step is taught is its gain, normalised over the trajectories of the prompt."
    )
    return f'<div class="card"><h3>How to read it</h3><p>{"</p><p>".join(told)}</p></div>'


def _strips(run: Path) -> list[Path]:
    found = sorted((run / "strips").glob("*.json"))
    return [path for path in found if path.with_suffix(".png").is_file()]


def _film(
    strip: Strip, name: str, row: np.ndarray, gains: np.ndarray, rewards: Sequence[float],
    most: float,
) -> str:  # fmt: skip
    """One trajectory: its pictures, above each the gain of the steps that led to it."""
    cells = []
    for k, shown in enumerate(np.split(row, len(rewards), axis=1)):
        last, alt = k == len(rewards) - 1, f"trajectory {name}, state {strip['states'][k]}"
        place = "image" if last else f"noise {strip['levels'][k]:.2f}"
        cells.append(
            f"<li>{_gain(gains[k - 1] / most, gains[k - 1]) if k else _gain(0, None)}"
            f"{pictures.picture(shown, alt, height=len(shown))}"
            f"<b>{rewards[k]:.2f}</b><small>{place}</small></li>"
        )
    between = f"from {rewards[0]:.3f} to {rewards[-1]:.3f}"
    return (
        f'<div class="card film"><h3>Trajectory {name}: reward {between}</h3>'
        f"<ol>{''.join(cells)}</ol></div>"
    )


def _gain(share: float, gain: float | None) -> str:
    """A bar up or down from the middle, and the number."""
    if gain is None:
        return '<div class="gain"><span></span></div>'
    side, kind = ("bottom", "good") if share >= 0 else ("top", "bad")
    style = f"{side}:50%;height:{50 * abs(share):.1f}%"
    told = f'<span class="{kind}">{gain:+.2f}</span>' if abs(gain) >= LEAST else "<span>0</span>"
    return f'<div class="gain">{told}<div><i class="{kind}" style="{style}"></i></div></div>'


def rewards(strip: Strip) -> Figure:
    """The rewards of the trajectories' clean estimates over the states."""
    figure, axes = axes_of()
    for name, line, colour in zip(NAMES, strip["rewards"], COLOURS, strict=False):
        axes.plot(strip["states"], line, "o-", color=colour, label=f"trajectory {name}")
    axes.xaxis.set_major_locator(MaxNLocator(11, integer=True))
    axes.set(xlabel="state (the last is the image)", ylabel="reward")
    axes.legend()
    return figure
