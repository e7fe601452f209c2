"""Figures of a comparison: medians over seeds with their bootstrap intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from sfgrpo import files
from sfgrpo.compare.statistics import LEVEL, Estimate, median, reach
from sfgrpo.compare.table import AXES, Measured
from sfgrpo.names import shortened
from sfgrpo.report.plots import COLOURS, MUTED

Groups = Mapping[str, Sequence[Measured]]
"""Variant -> its runs, in the order of the grid."""


def draw(folder: Path, groups: Groups, *, metric: str, goal: float) -> list[Path]:
    """Write curves.png (of `metric`), reach.png (the way to `goal`) and, if evaluations have any,
    others.png (of all other numbers); returns their paths."""
    names = dict.fromkeys(name for runs in groups.values() for r in runs for name in r.metrics)
    others = [name for name in names if name != metric]
    pictures = {"curves": curves(groups, [metric], goal=goal), "reach": ways(groups, metric, goal)}
    if others:
        pictures["others"] = curves(groups, others)
    paths = []
    for name, figure in pictures.items():
        path = folder / f"{name}.png"
        with files.replacing(path) as aside:
            figure.savefig(aside, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths


def shared_axes(groups: Groups) -> list[str]:
    """Axes that all runs have."""
    return [a for a in AXES if all(a in run.axes for runs in groups.values() for run in runs)]


def curves(groups: Groups, metrics: Sequence[str], *, goal: float | None = None) -> Figure:
    """A row of panels per metric, one against each axis. Thick lines are medians over seeds, bands
    their intervals, thin lines the runs."""
    axes = shared_axes(groups)
    figure, grid = plt.subplots(
        len(metrics), len(axes), figsize=(4.3 * len(axes) + 0.6, 2.7 * len(metrics) + 0.5),
        squeeze=False, sharey="row",
    )  # fmt: skip
    for row, metric in zip(grid, metrics, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            for runs, colour in zip(groups.values(), _colours(groups), strict=True):
                _curve(panel, [r for r in runs if metric in r.metrics], axis, metric, colour)
            if goal is not None:
                panel.axhline(goal, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            _scale(panel)
        row[0].set_title(shortened(metric.replace("_", " ")))
    for panel, axis in zip(grid[-1], axes, strict=True):
        panel.set_xlabel(AXES[axis])
    _legend(figure, groups)
    _caption(
        figure,
        f"thick: median over seeds (dotted: of those that came so far), band: its {LEVEL:.0%} "
        "interval, thin: runs",
    )
    return figure


def _curve(panel: Axes, runs: Sequence[Measured], axis: str, metric: str, colour: str) -> None:
    if not runs:
        return
    for run in runs:
        panel.plot(run.axes[axis], run.metrics[metric], color=colour, alpha=0.25, linewidth=0.8)
    places, estimates, whole = medians(runs, axis, metric)
    middle, low, high = np.array(estimates).T
    panel.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.plot(places[:whole], middle[:whole], "o-", color=colour, linewidth=2, markersize=3.5)
    rest = slice(max(whole - 1, 0), None)
    panel.plot(places[rest], middle[rest], ":", color=colour, linewidth=2)


def medians(
    runs: Sequence[Measured], axis: str, metric: str
) -> tuple[list[float], list[Estimate], int]:
    """At every iteration that any of the runs evaluated: the median place on the axis and the
    metric's estimate over the runs that came so far, straight lines between their own evaluations;
    and up to where (how many) all of them did."""
    places, estimates, counts = [], [], []
    paths = [_path(run, axis, metric) for run in runs]
    for iteration in sorted({k for own, _, _ in paths for k in own}):
        there = [
            (np.interp(iteration, own, at), np.interp(iteration, own, values))
            for own, at, values in paths
            if own.size and own[0] <= iteration <= own[-1]
        ]
        at, values = np.array(there).T
        places.append(float(np.median(at)))
        estimates.append(median(values))
        counts.append(len(there))
    whole = next((k for k, count in enumerate(counts) if count < len(runs)), len(counts))
    return places, estimates, whole


def _path(run: Measured, axis: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run's iterations, its places on the axis and its values, where it has the metric."""
    there = ~np.isnan(run.metrics[metric])
    return run.axes["iteration"][there], run.axes[axis][there], run.metrics[metric][there]


def ways(groups: Groups, metric: str, goal: float) -> Figure:
    """How far to `goal`: points are seeds, bars intervals of the median. A run that never came
    there is a cross at its end."""
    axes = shared_axes(groups)
    figure, row = plt.subplots(
        1, len(axes), figsize=(4.3 * len(axes) + 0.6, 0.5 * len(groups) + 1.5),
        squeeze=False, sharey=True,
    )  # fmt: skip
    for panel, axis in zip(row[0], axes, strict=True):
        for line, (runs, colour) in enumerate(zip(groups.values(), _colours(groups), strict=True)):
            _way(panel, runs, axis, metric, goal, -line, colour)
        panel.set_xlabel(f"{AXES[axis]} to {shortened(metric.replace('_', ' '))} {goal:.3f}")
        _scale(panel)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
    row[0][0].set_yticks([-k for k in range(len(groups))], [shortened(name) for name in groups])
    row[0][0].set_ylim(-len(groups) + 0.4, 0.6)
    told = f"points: seeds, bar: {LEVEL:.0%} interval of their median"
    _caption(figure, f"{told}; a cross is the end of a run that never came there")
    return figure


def _way(
    panel: Axes, runs: Sequence[Measured], axis: str, metric: str, goal: float, line: int,
    colour: str,
) -> None:  # fmt: skip
    needed = [
        reach(run.axes[axis], run.metrics[metric], goal) if metric in run.metrics else np.inf
        for run in runs
    ]
    for run, place in zip(runs, needed, strict=True):
        if np.isfinite(place):
            panel.plot(place, line, "o", color=colour, alpha=0.45, markersize=5)
        else:
            panel.plot(run.axes[axis][-1], line, "x", color=colour, markersize=6)
    middle, low, high = median(np.array(needed))
    end = max(float(run.axes[axis][-1]) for run in runs)
    if np.isfinite(low):
        panel.plot([low, min(high, end)], [line + 0.22] * 2, color=colour, linewidth=2.5)
    if not np.isfinite(high):
        panel.plot(end, line + 0.22, ">", color=colour, markersize=8)
    if np.isfinite(middle):
        panel.plot(middle, line + 0.22, "|", color=colour, markersize=12, markeredgewidth=2.5)


def _scale(panel: Axes) -> None:
    """An axis from 0, with short numbers."""
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _caption(figure: Figure, text: str) -> None:
    lines = textwrap.fill(text, int(14 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, horizontalalignment="left", fontsize=9, color=MUTED)


def _colours(groups: Groups) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(len(groups))]


def _legend(figure: Figure, groups: Groups) -> None:
    handles = [
        Line2D([], [], color=colour, linewidth=2, marker="o", markersize=3.5)
        for colour in _colours(groups)
    ]
    labels = [
        f"{shortened(name)} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        for name, runs in groups.items()
    ]
    widest = 0.8 + 0.09 * max(map(len, labels))  # inches, of the handle and 10 points a letter
    columns = max(1, int(figure.get_figwidth() / widest))
    figure.legend(handles, labels, loc="outside upper right", ncols=columns)
