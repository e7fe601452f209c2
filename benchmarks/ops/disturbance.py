"""Sees whether a machine was busy with something else while an entry was timed, and times it again.

Three things are looked at: how far the first and the last quartile of the rounds lie apart; how
slow a plain copy was, just before and just after, against the fastest one of its size in the same
table; and the load average, which is told and judges nothing, as it contains the table itself.  A
disturbance that lasts shows in the copy, one that comes and goes in the quartiles.

What was disturbed is timed again, at most ``ATTEMPTS`` times, and the calmest attempt counts.  If
even that one was disturbed the entry says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.ops import measure

SPREAD = 1.4
"""Last quartile over the first, from which on rounds are disturbed.  An idle machine stays below
it in nine entries of ten."""

SLOWER = 1.3
"""Slowest copy beside an entry over the fastest of its size, likewise."""

ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The rounds of an entry and what the machine was like meanwhile."""

    times: Sequence[float]
    """Seconds of each round."""
    copies: tuple[float, float]
    """Seconds of a plain copy of the entry's bytes before and after the rounds."""
    fastest_copy: float
    """Of as many bytes, on as many threads, in this table so far."""
    load: float | None
    """Average of the last minute; None where the system has none."""

    @property
    def spread(self) -> float:
        levels = torch.tensor([0.25, 0.75], dtype=torch.float64)
        first, last = torch.tensor(self.times, dtype=torch.float64).quantile(levels).tolist()
        return last / first

    @property
    def slower(self) -> float:
        return max(self.copies) / self.fastest_copy

    @property
    def disturbance(self) -> float:
        """Above 1 where the attempt was disturbed."""
        return max(self.spread / SPREAD, self.slower / SLOWER)

    @property
    def copy_seconds(self) -> float:
        return sum(self.copies) / 2


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The calmest attempt at an entry."""

    attempt: Attempt
    attempts: int = 1

    @property
    def disturbed(self) -> bool:
        return self.attempt.disturbance > 1

    def record(self) -> dict[str, Any]:
        """What the entry's line tells of it."""
        return {
            "attempts": self.attempts,
            "spread": round(self.attempt.spread, 2),
            "copy_slower": round(self.attempt.slower, 2),
            "load": self.attempt.load,
            "disturbed": self.disturbed,
        }


@dataclass
class Watch:
    """Times the entries of one table."""

    fastest: dict[tuple[int, int], float] = field(default_factory=dict)
    """(bytes, threads) -> seconds of the fastest copy."""

    def timed(
        self,
        number_of_bytes: int,
        rounds: Callable[[], Sequence[float]],
        again: Callable[[], Sequence[float]] | None = None,
    ) -> Timed:
        """Time an entry, and again while it is disturbed.

        Args:
            number_of_bytes: that the entry must move.
            rounds: times the entry, returns the seconds of each round.
            again: the same for all attempts but the first; default ``rounds``.
        """
        calmest = self._attempt(number_of_bytes, rounds)
        for made in range(1, ATTEMPTS):
            if calmest.disturbance <= 1:
                return Timed(attempt=calmest, attempts=made)
            attempt = self._attempt(number_of_bytes, again or rounds)
            calmest = min(calmest, attempt, key=lambda each: each.disturbance)
        return Timed(attempt=calmest, attempts=ATTEMPTS)

    def _attempt(self, number_of_bytes: int, rounds: Callable[[], Sequence[float]]) -> Attempt:
        size = (number_of_bytes, torch.get_num_threads())
        before = measure.copy_seconds(number_of_bytes)
        times = rounds()
        copies = (before, measure.copy_seconds(number_of_bytes))
        self.fastest[size] = min(*copies, self.fastest.get(size, before))
        return Attempt(
            times=times, copies=copies, fastest_copy=self.fastest[size], load=_load_average()
        )


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 1)
    except (AttributeError, OSError):  # Windows has none, nor has a sandbox without /proc
        return None
