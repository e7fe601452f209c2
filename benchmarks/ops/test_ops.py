"""Times every entry of the table: ``pytest --benchmark-only`` at the root, or ``make bench``.

pytest-benchmark compares the implementations of one op, direction, shape and dtype.  Each entry's
results are checked before it is timed, and its copy is timed before and after it, so that a machine
that slows down slows down both; what was disturbed is timed again (``benchmarks.ops.disturbance``).
What a call takes the host is measured once for each row.  Where the process has several threads an
entry is timed on one as well, but for ``torch.compile``, which would compile it anew.  A complete
run writes ``benchmarks/results/ops_<device>.json``; until then what is measured stands in
``ops_<device>.partial.json``, where ``--resume`` takes it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops import measure
from benchmarks.ops.disturbance import Timed, Watch
from benchmarks.ops.host import host_us
from benchmarks.ops.record import Record, measurements
from benchmarks.ops.table import COMPILE, ENTRIES, Entry
from benchmarks.ops.verify import runner

WATCH = Watch()


@pytest.mark.benchmark(timer=measure.now)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_ops(benchmark: BenchmarkFixture, record: Record, entry: Entry) -> None:
    if str(entry) in record.found:
        pytest.skip("measured before the table was interrupted")
    host = host_us(entry.row.title).get(entry.implementation)
    run = runner(entry, measure.device())
    peak = measure.peak_memory(run)
    count = measure.rounds_for(run)
    benchmark.group, benchmark.name = entry.group, entry.implementation
    if benchmark.disabled:  # called once, not timed
        benchmark(run)
        return

    def through_the_plugin() -> Sequence[float]:
        benchmark.pedantic(run, setup=measure.flush, rounds=count, warmup_rounds=2, iterations=1)
        stats: Any = benchmark.stats
        return stats.stats.data

    timed = WATCH.timed(entry.bytes, through_the_plugin, lambda: measure.rounds(run, count))
    measured = measurements(entry, timed, _on_one_thread(entry, run), peak, host)
    benchmark.extra_info.update(measured)
    record.add(entry, measured)


def _on_one_thread(entry: Entry, run: Callable[[], object]) -> Timed | None:
    threads = torch.get_num_threads()
    if measure.device().type != "cpu" or threads == 1 or entry.implementation == COMPILE:
        return None
    torch.set_num_threads(1)
    try:
        count = measure.rounds_for(run)
        return WATCH.timed(entry.bytes, lambda: measure.rounds(run, count))
    finally:
        torch.set_num_threads(threads)
