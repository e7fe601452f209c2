"""How figures look, and the evaluation curves of several runs in one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfgrpo import files
from sfgrpo.names import shortened
from sfgrpo.report import logs
from sfgrpo.report.look import COLOURS, GRID, INK, MUTED

Log = Sequence[Mapping[str, Any]]

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


def axes_of(width: float = 4.9, height: float = 2.75) -> tuple[Figure, Axes]:
    """One panel, by default of the size of a card in a report, whose text stays legible on a
    telephone."""
    return plt.subplots(figsize=(width, height))


def column(log: Log, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`(iterations, values)` of one number of a log."""
    rows = [row for row in log if name in row]
    return np.array([r["iteration"] for r in rows]), np.array([r[name] for r in rows])


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
    figure, axes = axes_of(7.2, 4.0)
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
