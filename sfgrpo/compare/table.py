"""What the runs of a grid measured: one tidy table, and its columns as arrays.

Three axes, each cumulative over training up to an evaluation:

iteration              of the evaluation
seconds                of timing.jsonl without evaluation and checkpoints; loading is not in it
velocity_evaluations   rows that the velocity network evaluated, a row with its gradient as three:
                       a backward pass takes twice the operations of the forward
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfgrpo import files
from sfgrpo.compare.grid import Run
from sfgrpo.report import logs
from sfgrpo.run import records

AXES = {
    "iteration": "iterations", "seconds": "seconds", "velocity_evaluations": "velocity evaluations",
}  # fmt: skip
"""Axis -> how it is called in text."""
ROWS = {"velocity": 1, "gradient": 3}
"""Kind of row in `cost` of metrics.jsonl -> velocity evaluations."""


@dataclass(frozen=True)
class Measured:
    """The evaluations (E) of a run."""

    variant: str
    seed: int
    finished: bool
    """Whether all iterations are there."""
    axes: dict[str, np.ndarray]
    """Of `AXES` those that the run has: [E]."""
    metrics: dict[str, np.ndarray]
    """[E] each; NaN where an evaluation lacks it."""
    missing: dict[str, str]
    """Axis that it lacks -> why."""


def measured(runs: Sequence[Run]) -> list[Measured]:
    """Those of the runs that have an evaluation.

    Raises:
        ValueError: a log that is something else; names the run.
    """
    return [_measured(run) for run in runs if records.read(run.folder / "eval.jsonl")]


def _measured(run: Run) -> Measured:
    evaluations = [
        row for row in logs.rows(run.folder, "eval") if row["iteration"] <= run.iterations
    ]
    iterations = np.array([row["iteration"] for row in evaluations])
    names = dict.fromkeys(
        name for row in evaluations for name, value in row.items()
        if name != "iteration" and isinstance(value, int | float)
    )  # fmt: skip
    axes, missing = {"iteration": iterations.astype(float)}, {}
    for axis, log, cost in (
        ("seconds", "timing", _seconds),
        ("velocity_evaluations", "metrics", _velocity_evaluations),
    ):
        path = run.folder / f"{log}.jsonl"
        try:
            costs = {row["iteration"]: cost(row) for row in records.read(path)}
        except KeyError as error:
            missing[axis] = f"'{path}' has no {error}"
            continue
        if costs or not iterations.any():
            axes[axis] = _cumulative(costs, iterations)
        else:
            missing[axis] = f"'{path}' has no line"
    return Measured(
        run.variant, run.seed, bool(iterations[-1] >= run.iterations), axes,
        {name: np.array([row.get(name, np.nan) for row in evaluations], float) for name in names},
        missing,
    )  # fmt: skip


def _seconds(row: Mapping[str, Any]) -> float:
    return row["seconds"] - sum(row["phases"].get(phase, 0.0) for phase in records.BETWEEN)


def _velocity_evaluations(row: Mapping[str, Any]) -> float:
    cost = row["cost"]
    return sum(weight * cost[kind] for kind, weight in ROWS.items())


def _cumulative(costs: Mapping[int, float], iterations: np.ndarray) -> np.ndarray:
    """What all iterations up to each of these cost; [E].

    A run that is asked to stop saves the iteration that it is in, whose line in timing.jsonl it
    does not write any more: such an iteration counts like the run's median one.
    """
    usual = float(np.median(list(costs.values()))) if costs else 0.0
    each = [costs.get(k, usual) for k in range(1, int(iterations.max()) + 1)]
    return np.cumsum([0.0, *each])[iterations]


def write(path: Path, runs: Sequence[Measured]) -> None:
    """The table as CSV, a line per run, evaluation and metric; axes that a run lacks are empty."""
    with files.replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["variant", "seed", *AXES, "metric", "value"])
        for run in runs:
            for k in range(len(run.axes["iteration"])):
                places = [_number(run.axes[a][k]) if a in run.axes else "" for a in AXES]
                for metric, values in run.metrics.items():
                    if not np.isnan(values[k]):
                        lines.writerow([run.variant, run.seed, *places, metric, float(values[k])])


def _number(value: float) -> float | int:
    """Whole numbers without a point."""
    return int(value) if float(value).is_integer() else round(float(value), 4)
