"""Medians, intervals, ways and tests against what is known of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sfgrpo.compare.statistics import EXACT, median, reach, sign_flip

INF = math.inf


def test_the_interval_of_three_is_their_range() -> None:
    """The least of three is the median of 7 in 27 resamples, far more than 2.5 %."""
    assert median(np.array([3.0, 1.0, 2.0])) == (2, 1, 3)
    assert median(np.array([4.0])) == (4, 4, 4)


def test_intervals_leave_out_what_is_rare() -> None:
    """The least of five is the median where three or more draws of five take it, in 5.8 % of the
    resamples; the least of six, where four or more of six do, in fewer than 2.5 %."""
    assert sum(math.comb(5, k) * 4 ** (5 - k) for k in (3, 4, 5)) / 5**5 > 0.025
    assert median(np.arange(5.0)) == (2, 0, 4)
    six = sorted(sum(sorted(chosen)[2:4]) / 2 for chosen in itertools.product(range(6), repeat=6))
    low = six[math.ceil(0.025 * len(six)) - 1]
    assert low > 0
    assert median(np.arange(6.0)).low == low


def test_many_seeds_are_resampled_at_random_but_always_alike() -> None:
    values = np.random.default_rng(1).normal(size=EXACT + 14)
    found = median(values)
    assert found == median(values)
    exact = stats.bootstrap((values,), np.median, method="percentile", rng=2)
    assert found.low == pytest.approx(exact.confidence_interval.low, abs=0.15)
    assert found.high == pytest.approx(exact.confidence_interval.high, abs=0.15)


def test_never_is_part_of_a_median() -> None:
    assert median(np.array([10.0, INF, 20.0])) == (20, 10, INF)
    assert median(np.array([10.0, INF, INF, INF])) == (INF, 10, INF)
    assert median(np.array([10.0, INF])) == (INF, 10, INF)


@pytest.mark.parametrize(
    ("values", "target", "place"),
    [
        ([0.0, 0.5, 1.0], 0.5, 10),
        ([0.0, 0.5, 1.0], 0.75, 15),
        ([0.0, 0.5, 1.0], 0.0, 0),
        ([0.0, 0.5, 1.0], -1.0, 0),
        ([0.0, 0.5, 1.0], 1.5, INF),
        ([0.0, 1.0, 0.0], 0.5, 5),  # the first time
        ([0.0, math.nan, 1.0], 0.5, 10),
        ([math.nan, math.nan, math.nan], 0.0, INF),
    ],
)
def test_the_way_is_linear_between_evaluations(
    values: list[float], target: float, place: float
) -> None:
    assert reach(np.array([0.0, 10.0, 20.0]), np.array(values), target) == pytest.approx(place)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, -2.0, -3.0], 2 / 8),
        ([0.1, 0.2, 0.3, 0.1, 0.2], 2 / 32),
        ([1.0, -1.0], 1.0),
        ([1.0, 2.0, -3.0], 1.0),
        ([3.0, 2.0, -1.0], 4 / 8),  # sums 6, 4, 2, 0 either way; 4 or more: 6 and 4
        ([0.0, 0.0], 1.0),
        ([5.0], 1.0),
    ],
)
def test_sign_patterns_counted_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip(np.array(differences)) == p


def test_the_test_is_scipys() -> None:
    differences = np.random.default_rng(0).normal(0.5, size=8)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**8
    )
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)
