"""The figures of one run's report, from the logs a run leaves. Titles stand in the page."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from sfgrpo.report.look import COLOURS, MUTED
from sfgrpo.report.plots import Log, axes_of, column

SMALL = (3.7, 2.2)
"""Inches of a panel that stands beside two others."""
MAP = "viridis"
"""Of heat maps: dark to light, legible on light and on dark pages, and in print."""


def reward(metrics: Log, evaluations: Log) -> Figure:
    """Training reward per iteration and the reward on held-out noise."""
    figure, axes = axes_of()
    axes.plot(*column(metrics, "reward"), color=COLOURS[0], alpha=0.4, label="training samples")
    axes.plot(
        *column(evaluations, "reward"), "o-", color=COLOURS[1], markersize=4, linewidth=2,
        label="held-out noise",
    )  # fmt: skip
    axes.set(xlabel="iteration")
    axes.legend(loc="lower right")
    return figure


def gains(metrics: Log) -> Figure:
    """Mean |gain| of every step in every iteration; steps without credit are left blank."""
    return heat(metrics, "gain_per_step", "mean |gain|")


def heat(log: Log, name: str, unit: str, *, logarithmic: bool = False) -> Figure:
    """A number of every step in every iteration; where it is 0 there is no cell."""
    rows = [row for row in log if name in row]
    values = np.ma.masked_equal(np.array([row[name] for row in rows], float).T, 0)
    norm = LogNorm(values.min(), values.max()) if logarithmic and values.count() else None
    figure, axes = axes_of()
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    shown = axes.imshow(
        values, aspect="auto", interpolation="nearest", cmap=MAP, norm=norm,
        extent=(first - 0.5, last + 0.5, len(values) - 0.5, -0.5),
    )  # fmt: skip
    axes.set(xlabel="iteration", ylabel="sampling step")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=False)
    bar = figure.colorbar(shown, ax=axes, pad=0.02, aspect=18)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(unit, labelpad=8)
    if norm:  # matplotlib's own labels of powers are formulas, which text.parse_math shows raw
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def gain_per_step(metrics: Log) -> Figure:
    """Mean |gain| of every sampling step, in the first and the last fifth of the run, over the
    iterations in which the step had a gain at all."""
    figure, axes = axes_of()
    gained = np.ma.masked_equal([row["gain_per_step"] for row in metrics], 0)
    steps = np.arange(gained.shape[1])
    for place, (part, label) in enumerate(_fifths(gained)):
        means = part.mean(0).filled(0)
        axes.bar(steps + 0.4 * place - 0.2, means, 0.4, color=COLOURS[place], label=label)
    axes.xaxis.set_major_locator(MaxNLocator(11, integer=True))
    axes.set(xlabel="sampling step")
    axes.legend()
    return figure


def reward_per_state(metrics: Log) -> Figure:
    """Mean reward of the clean estimate of every state, at the start and the end of the run, over
    the iterations in which the state was scored: others carry the reward of the next one."""
    figure, axes = axes_of()
    rewards = np.array([row["reward_per_state"] for row in metrics])
    own = np.diff(rewards, axis=1, append=np.nan) != 0
    for place, (part, label) in enumerate(_fifths(np.ma.array(rewards, mask=~own))):
        means = part.mean(0)
        there = np.flatnonzero(~np.ma.getmaskarray(means))
        axes.plot(there, means[there], "o-", color=COLOURS[place], markersize=4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(11, integer=True))
    axes.set(xlabel="state (0: pure noise, last: the image)")
    axes.legend()
    return figure


def _fifths(values: np.ma.MaskedArray) -> list[tuple[np.ma.MaskedArray, str]]:
    part = max(1, len(values) // 5)
    return [(values[:part], "first fifth"), (values[-part:], "last fifth")]


def number(log: Log, name: str, *, dots: bool = False, limit: float | None = None) -> Figure:
    """One number of a log in a small panel, with a dashed line at a `limit`."""
    figure, axes = axes_of(*SMALL)
    axes.plot(*column(log, name), "o-" if dots else "-", color=COLOURS[0], markersize=3.5)
    if limit is not None:
        axes.axhline(limit, color=COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.margins(y=0.12)
    _small(axes)
    return figure


def ratio(metrics: Log, clip_range: float) -> Figure:
    """The largest and the smallest ratio of each iteration between the clipping limits."""
    figure, axes = axes_of(*SMALL)
    for name, colour in (("ratio_max", COLOURS[1]), ("ratio_min", COLOURS[0])):
        axes.plot(*column(metrics, name), color=colour, label=name.replace("_", " "))
    axes.axhspan(1 - clip_range, 1 + clip_range, color=MUTED, alpha=0.3, linewidth=0)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    _small(axes)
    return figure


def _small(axes: Axes) -> None:
    axes.set(xlabel="iteration")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
