"""Medians over seeds with bootstrap intervals, the way to a reward, a paired test.

Nothing here assumes a distribution, and a run that never came to R is part of every number: it
took infinitely long.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
DRAWS = 10_000
EXACT = 6
"""So many seeds have at most 46,656 resamples, which are all taken; of more, `DRAWS` are drawn."""


class Estimate(NamedTuple):
    """A median and its interval."""

    median: float
    low: float
    high: float


def median(values: np.ndarray) -> Estimate:
    """The median of `values` [S] and its percentile bootstrap interval (Efron 1979).

    The S values are resampled with replacement: in all S^S ways up to `EXACT` of them, else at
    random from a fixed seed. Values may be infinite, not NaN. With few seeds the interval is their
    range: it then covers the median of the seeds' distribution with probability 1 - 2^(1 - S).
    """
    seeds = len(values)
    if seeds <= EXACT:
        chosen = np.array(list(itertools.product(range(seeds), repeat=seeds)))
    else:
        chosen = np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))
    medians = _median(values[chosen])
    # No interpolation: between a number and infinity there is none.
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Estimate(float(_median(values)), float(low), float(high))


def _median(values: np.ndarray) -> np.ndarray:
    """Over the last axis; np.median without its warning for two infinities."""
    ordered, half = np.sort(values, axis=-1), values.shape[-1] // 2
    if values.shape[-1] % 2:
        return ordered[..., half]
    return ordered[..., half - 1] * 0.5 + ordered[..., half] * 0.5


def reach(places: np.ndarray, values: np.ndarray, target: float) -> float:
    """Where a curve first comes to `target`, linear between its points; infinity if it never does.

    Args:
        places: [E], growing.
        values: [E]; NaN where there is none.
    """
    known = ~np.isnan(values)
    places, values = places[known], values[known]
    above = np.flatnonzero(values >= target)
    if not len(above):
        return np.inf
    k = above[0]
    if k == 0:
        return float(places[0])
    part = (target - values[k - 1]) / (values[k] - values[k - 1])
    return float(places[k - 1] + part * (places[k] - places[k - 1]))


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p of paired differences [S] under the hypothesis that each is as likely as its
    opposite: the share of all 2^S sign patterns whose mean is as far from 0 (Fisher 1935).

    Exact, and never below `least_p`.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    # The observed sum itself must count, however its terms were rounded.
    rounding = 1e-9 * np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))


def least_p(pairs: int) -> float:
    """The smallest p that `sign_flip` can have: all of one sign, and its opposite."""
    return 2.0 ** (1 - pairs)
