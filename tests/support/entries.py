"""Tiny entries of the benchmark table, and what might be measured of one."""

from __future__ import annotations

from typing import Any

from benchmarks.ops.disturbance import Attempt, Timed
from benchmarks.ops.record import measurements
from benchmarks.ops.shapes import FP32, REWARDS, Precision, Shape
from benchmarks.ops.table import BY_TITLE, Entry


def tiny(title: str, implementation: str, precision: Precision = FP32) -> Entry:
    row = BY_TITLE[title]
    sample = (4, 5) if row.shapes is REWARDS else (2, 5, 3)
    shape = Shape("tiny", 5, sample)
    return Entry(row=row, shape=shape, precision=precision, implementation=implementation)


def measured(entry: Entry) -> dict[str, Any]:
    """On two threads disturbed, as its quartiles tell; on one thread calm."""

    def timed(*times: float) -> Timed:
        attempt = Attempt(times=times, copies=(4e-4, 6e-4), fastest_copy=4.8e-4, load=1.5)
        return Timed(attempt=attempt)

    return measurements(
        entry, timed(2e-3, 1e-3, 4e-3), timed(3e-3, 3e-3, 3e-3), 7, host_us=(20.0, 21.0, 30.0)
    )
