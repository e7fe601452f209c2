"""Figures of one run and of several, from the logs a run leaves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from PIL.PngImagePlugin import PngImageFile

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfgrpo import files
from sfgrpo.names import shortened
from sfgrpo.report import logs

Log = Sequence[Mapping[str, Any]]

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = (
    "#0b6e99",
    "#d9730d",
    "#2f7d4f",
    "#a3336b",
    "#6b4fbb",
    "#8a6d3b",
    "#56a3c2",
    "#9aa5b1",
    "#c7a92c",
    "#3f4a54",
)

plt.rcParams.update(
    {
        "axes.edgecolor": MUTED,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.color": GRID,
        "legend.frameon": False,
        "text.color": INK,
        "text.parse_math": False,  # prompts and names of the user's may hold dollar signs
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
)


def _axes(width: float = 6.4, height: float = 3.4) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(width, height))


def column(log: Log, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`(iterations, values)` of one number of a log."""
    rows = [row for row in log if name in row]
    return np.array([r["iteration"] for r in rows]), np.array([r[name] for r in rows])


def reward_curve(metrics: Log, evaluations: Log) -> Figure:
    """Training reward per iteration and the reward on held-out noise."""
    figure, axes = _axes()
    axes.plot(*column(metrics, "reward"), color=COLOURS[0], alpha=0.35, label="training samples")
    axes.plot(*column(evaluations, "reward"), "o-", color=COLOURS[0], label="held-out noise")
    axes.set(title="Reward", xlabel="iteration")
    axes.legend(loc="lower right")
    return figure


def judges(evaluations: Log, names: Sequence[str]) -> Figure:
    """Everything else measured on held-out noise, each relative to its own range."""
    columns = 4
    lines = -(-max(len(names), 1) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(12.5, 2.6 * lines), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        axes.plot(*column(evaluations, name), "o-", color=COLOURS[2], markersize=4)
        axes.set(title=shortened(name.replace("_", " ")), xlabel="iteration")
    return figure


def gain_per_step(metrics: Log) -> Figure:
    """Mean |gain| of every sampling step, in the first and the last fifth of the run."""
    figure, axes = _axes()
    gains = np.array([row["gain_per_step"] for row in metrics])
    part = max(1, len(gains) // 5)
    steps = np.arange(gains.shape[1])
    axes.bar(steps - 0.2, gains[:part].mean(0), 0.4, color=COLOURS[0], label="first fifth")
    axes.bar(steps + 0.2, gains[-part:].mean(0), 0.4, color=COLOURS[1], label="last fifth")
    axes.set_xticks(steps)
    axes.set(title="Mean |gain| per step", xlabel="sampling step")
    axes.legend()
    return figure


def reward_per_state(metrics: Log) -> Figure:
    """Mean reward of the clean estimate of every state, at the start and the end of the run."""
    figure, axes = _axes()
    rewards = np.array([row["reward_per_state"] for row in metrics])
    part = max(1, len(rewards) // 5)
    axes.plot(rewards[:part].mean(0), "o-", color=COLOURS[0], label="first fifth")
    axes.plot(rewards[-part:].mean(0), "o-", color=COLOURS[1], label="last fifth")
    axes.set(title="Reward of the clean estimate", xlabel="state (0: pure noise, last: the image)")
    axes.legend()
    return figure


def health(metrics: Log) -> Figure:
    """KL, clip fraction, gradient norm and rollout/training drift."""
    figure, grid = plt.subplots(1, 4, figsize=(12.5, 2.6))
    shown = ("kl", "clip_fraction", "grad_norm", "logp_drift_max")
    for axes, name in zip(grid, shown, strict=True):
        axes.plot(*column(metrics, name), color=COLOURS[0])
        axes.set(title=name.replace("_", " "), xlabel="iteration")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    return figure


PHASES = {
    "estimates": "clean estimates", "decode": "decoding", "train": "training",
    "rewards": "rewards (waiting for them)",
    "evaluate": "evaluation", "checkpoint": "checkpoints",
}  # fmt: skip
"""How phases are called in pictures."""


def timing(timings: Log) -> Figure:
    """Mean seconds and share of each phase of an iteration; below, the slowest rank's."""
    figure, axes = _axes(height=2.6)
    bars: list[dict[str, float]] = [defaultdict(float), defaultdict(float)]
    for row in timings:
        for bar, kind in zip(bars, ("phases", "slowest"), strict=True):
            for phase, value in row[kind].items():
                bar[phase] += value / len(timings)
    total = sum(bars[0].values())
    images = sum(row["images_per_second"] for row in timings) / max(1, len(timings))
    for place, bar in enumerate(bars):
        left = 0.0
        for (phase, value), colour in zip(bar.items(), COLOURS * 3, strict=False):
            share = f"{PHASES.get(phase, phase)} {value:.2f} s, {value / total:.0%}"
            label = share if place == 0 else None
            axes.barh(-place, value, 0.8 - 0.5 * place, left=left, color=colour, label=label)
            left += value
    axes.set(title=f"{total:.1f} seconds per iteration, {images:.1f} images a second")
    axes.set_yticks([0, -1], ["mean of ranks", "slowest rank"])
    axes.set(xlabel="seconds")
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35), fontsize=8)
    return figure


COSTS = {
    "velocity": "velocities", "gradient": "velocities\nwith gradient",
    "decoded": "decoded", "scored": "scored",
}  # fmt: skip
"""How the kinds of `cost` in metrics.jsonl are called in pictures."""


def cost(metrics: Log) -> Figure:
    """Mean counts of what an iteration takes, by kind."""
    figure, axes = _axes(height=2.6)
    counted = [row["cost"] for row in metrics]
    means = [float(np.mean([row[kind] for row in counted])) for kind in COSTS]
    bars = axes.barh(range(len(COSTS)), means, color=COLOURS[: len(COSTS)])
    axes.bar_label(bars, [f"{mean:,.0f}" for mean in means], padding=4)
    axes.set_yticks(range(len(COSTS)), list(COSTS.values()))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="An iteration in network rows and samples")
    axes.grid(visible=False, axis="y")
    return figure


def before_after(run: Path, first: int, last: int, *, rows: int = 10) -> Figure:
    """Images of two evaluations of a run side by side: same prompts, same noise.

    `rows` prompts are spread evenly over those that were evaluated.
    """
    prompts = (run / "images" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    shown = np.unique(np.linspace(0, len(prompts) - 1, min(rows, len(prompts))).round().astype(int))
    pictures = [_rows(run / "images" / f"{k:06d}.png", len(prompts), shown) for k in (first, last)]
    side = pictures[0].shape[0] // len(shown)
    height = 0.52 * len(shown)
    width = height * pictures[0].shape[1] / pictures[0].shape[0]
    # 3 inches for the prompts on the left; the rest is the two pictures at their own aspect.
    figure, pair = plt.subplots(1, 2, figsize=(2 * width + 3.6, height + 0.5), sharey=True)
    for axes, picture, iteration in zip(pair, pictures, (first, last), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set(title="before" if iteration == first else f"after {iteration} iterations")
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    labels = [shortened(prompts[k]) for k in shown]
    pair[0].set_yticks(side * (np.arange(len(shown)) + 0.5), labels)
    return figure


def _rows(path: Path, count: int, shown: np.ndarray) -> np.ndarray:
    """The rows `shown` of a grid of `count`, one below the other."""
    # Not Image.open, which takes a picture of more than 179 megapixels for an attack.
    with PngImageFile(path) as picture:
        grid = np.asarray(picture)
    side = len(grid) // count
    return np.concatenate([grid[side * k : side * (k + 1)] for k in shown])


def compare(runs: Sequence[Path], out: Path, *, metric: str = "reward") -> Path:
    """Evaluation curves of several runs in one picture, runs of a credit rule in one colour.

    Thin lines are runs, the thick one is their mean.

    Raises:
        ValueError: a folder without evaluations, or without this metric.
    """
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for run in runs:
        log = logs.rows(run, "eval")
        if not any(metric in row for row in log):
            known = sorted({name for row in log for name in row} - {"iteration"})
            raise ValueError(f"'{run}' has no evaluation of '{metric}' (known: {', '.join(known)})")
        _, rule = logs.recipe(run)
        curves[rule].append(column(log, metric))
    figure, axes = _axes(7.2, 4.0)
    for (rule, lines), colour in zip(sorted(curves.items()), COLOURS, strict=False):
        for iterations, values in lines:
            axes.plot(iterations, values, color=colour, alpha=0.3, linewidth=1)
        shared = sorted(set.intersection(*({int(i) for i in x} for x, _ in lines)))
        mean = [np.mean([y[list(x).index(i)] for x, y in lines]) for i in shared]
        axes.plot(
            shared,
            mean,
            "o-",
            color=colour,
            linewidth=2.2,
            label=f"{shortened(rule)} ({len(lines)} seeds)",
        )
    axes.set(title=f"{shortened(metric.replace('_', ' '))} on held-out noise", xlabel="iteration")
    axes.legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out) as aside:
        figure.savefig(aside, dpi=160)
    plt.close(figure)
    return out
