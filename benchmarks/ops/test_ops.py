"""Times every entry of the table: ``pytest --benchmark-only`` at the root, or ``make bench``.

pytest-benchmark compares the implementations of one op, direction, shape and dtype.  Each entry's
results are checked before it is timed, and its copy is timed beside it, so that a machine that
slows down slows down both.  What a call takes the host is measured once for each row.  All threads
of the process are used; ``benchmarks/ops/ratios.py`` compares one thread with two.  A complete run
writes ``benchmarks/results/ops_<device>.json``; until then what is measured stands in
``ops_<device>.partial.json``, where ``--resume`` takes it up.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops import measure
from benchmarks.ops.host import host_us
from benchmarks.ops.record import Record, measurements
from benchmarks.ops.table import ENTRIES, Entry
from benchmarks.ops.verify import runner


@pytest.mark.benchmark(timer=measure.now)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_ops(benchmark: BenchmarkFixture, record: Record, entry: Entry) -> None:
    if str(entry) in record.found:
        pytest.skip("measured before the table was interrupted")
    host = host_us(entry.row.title).get(entry.implementation)
    run = runner(entry, measure.device())
    peak = measure.peak_memory(run)
    copy = measure.copy_seconds(entry.bytes)
    benchmark.group, benchmark.name = entry.group, entry.implementation
    benchmark.pedantic(
        run, setup=measure.flush, rounds=measure.rounds_for(run), warmup_rounds=2, iterations=1
    )
    if benchmark.stats is None:  # --benchmark-disable: called once, not timed
        return
    measured = measurements(entry, benchmark.stats.stats.data, copy, peak, host)
    benchmark.extra_info.update(measured)
    record.add(entry, measured)
