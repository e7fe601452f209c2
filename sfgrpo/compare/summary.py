"""What a comparison says in numbers: the end of the runs, the way to R, each against the reference.

Pairs are runs of equal seeds. The ratio of a pair is what the variant needed to R over what the
reference needed; where that never came to R it counts with its whole length, which flatters it. A
run that is not finished has no end, and as a reference no length; as a variant it needed infinitely
long unless it came to R. Intervals of ratios take R itself as given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfgrpo.compare.statistics import Estimate, median, reach, sign_flip
from sfgrpo.compare.table import AXES, Measured

By = Mapping[str, Mapping[int, Measured]]
"""Variant -> seed -> run."""


def summarise(
    runs: Sequence[Measured], *, reference: str, metric: str, target: float | None
) -> dict[str, Any]:
    """Numbers for JSON; None stands for infinity, and for what cannot be said.

    Raises:
        ValueError: no run has this metric, or the reference has none to define R.
    """
    by: dict[str, dict[int, Measured]] = {}
    for run in runs:
        by.setdefault(run.variant, {})[run.seed] = run
    known = sorted({name for run in runs for name in run.metrics})
    if metric not in known:
        raise ValueError(f"no evaluation has '{metric}' (known: {', '.join(known) or 'none yet'})")
    ends = _ends(by.get(reference, {}), metric)
    if target is None and not ends:
        raise ValueError(f"no run of the reference '{reference}' is finished, and R is its end")
    goal = float(np.median(list(ends.values()))) if target is None else target
    return {
        "reference": reference,
        "metric": metric,
        "reach": goal,
        "variants": {name: _variant(by, name, reference, metric, goal, known) for name in by},
    }


def _variant(
    by: By, name: str, reference: str, metric: str, goal: float, known: Sequence[str]
) -> dict[str, Any]:
    here, there = by[name], by.get(reference, {})
    paired = name != reference
    return {
        "seeds": sorted(here),
        "finished": sorted(seed for seed, run in here.items() if run.finished),
        "end": {
            other: _end(_ends(here, other), _ends(there, other) if paired else {})
            for other in known
        },
        "to_reach": {
            axis: _way(here, there if paired else {}, axis, metric, goal)
            for axis in AXES if all(axis in run.axes for run in here.values())
        },
    }  # fmt: skip


def _ends(runs: Mapping[int, Measured], metric: str) -> dict[int, float]:
    """Seed -> the last value of a run that is finished."""
    lasts = {
        seed: float(run.metrics[metric][-1])
        for seed, run in runs.items() if run.finished and metric in run.metrics
    }  # fmt: skip
    return {seed: value for seed, value in lasts.items() if not math.isnan(value)}


def _end(here: Mapping[int, float], there: Mapping[int, float]) -> dict[str, Any]:
    differences = [here[seed] - there[seed] for seed in sorted(here.keys() & there.keys())]
    return {
        **_estimate(list(here.values())),
        "difference": {**_estimate(differences), **_test(differences)} if differences else None,
    }


def _way(
    here: Mapping[int, Measured],
    there: Mapping[int, Measured],
    axis: str,
    metric: str,
    goal: float,
) -> dict[str, Any]:
    needed = {seed: _needed(run, axis, metric, goal) for seed, run in here.items()}
    ratios = []
    for seed in sorted(here.keys() & there.keys()):
        if there[seed].finished and axis in there[seed].axes:
            length = float(there[seed].axes[axis][-1])
            ratios.append(_ratio(needed[seed], _needed(there[seed], axis, metric, goal), length))
    return {
        **_estimate(list(needed.values())),
        "reached": sum(map(math.isfinite, needed.values())),
        "of": len(needed),
        "ratio": {**_estimate(ratios), **_test(_logarithms(ratios))} if ratios else None,
    }


def _needed(run: Measured, axis: str, metric: str, goal: float) -> float:
    if metric not in run.metrics:
        return math.inf
    return reach(run.axes[axis], run.metrics[metric], goal)


def _ratio(here: float, there: float, length: float) -> float:
    """Nothing over nothing, both at R from the start, is 1."""
    there = min(there, length)
    if there:
        return here / there
    return math.inf if here else 1.0


def _estimate(values: Sequence[float]) -> dict[str, float | None]:
    found = median(np.array(values)) if values else Estimate(math.inf, math.inf, math.inf)
    return {k: v if math.isfinite(v) else None for k, v in found._asdict().items()}


def _logarithms(ratios: Sequence[float]) -> list[float]:
    """Differences, of opposite signs for a ratio and its inverse; infinite for 0 and for never."""
    return [math.log(ratio) if ratio else -math.inf for ratio in ratios]


def _test(differences: Sequence[float]) -> dict[str, Any]:
    """No p where a difference is infinite: no mean is then."""
    finite = all(map(math.isfinite, differences))
    return {"pairs": len(differences), "p": sign_flip(np.array(differences)) if finite else None}
