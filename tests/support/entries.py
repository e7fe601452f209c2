"""Tiny entries of the benchmark table, and what might be measured of one."""

from __future__ import annotations

from typing import Any

from benchmarks.ops.record import measurements
from benchmarks.ops.shapes import FP32, REWARDS, Precision, Shape
from benchmarks.ops.table import BY_TITLE, Entry


def tiny(title: str, implementation: str, precision: Precision = FP32) -> Entry:
    row = BY_TITLE[title]
    sample = (4, 5) if row.shapes is REWARDS else (2, 5, 3)
    shape = Shape("tiny", 5, sample)
    return Entry(row=row, shape=shape, precision=precision, implementation=implementation)


def measured(entry: Entry) -> dict[str, Any]:
    return measurements(
        entry, [2e-3, 1e-3, 4e-3], copy_seconds=5e-4, peak_bytes=7, host_us=(20.0, 21.0, 30.0)
    )
