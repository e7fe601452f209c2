"""Times every contender of every op; ``pytest benchmarks --benchmark-only`` prints the table.

Each contender's results are checked against the published form before it is timed.  Per entry,
``extra_info`` holds the bytes that must be moved, the rate they moved at, and the time of a plain
copy of as many bytes as a fraction of the measured one (1 would be the speed of memory).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.table import TABLE, copy_seconds, device, operands, runner

THREADS = [1, 2] if device().type == "cpu" else [torch.get_num_threads()]
ENTRIES = [(op, name) for op, row in TABLE.items() for name in row.contenders]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _time(benchmark: BenchmarkFixture, op: str, name: str, v_dtype: torch.dtype) -> None:
    row, o = TABLE[op], operands(device(), v_dtype)
    run = runner(row, name, o)
    calls = []

    def timed() -> None:
        start = time.perf_counter()
        run()
        calls.append(time.perf_counter() - start)

    benchmark(timed)
    moved, best = row.traffic(o), min(calls)
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["GB/s"] = round(moved / best / 1e9, 2)
    benchmark.extra_info["fraction of copy"] = round(copy_seconds(moved, device()) / best, 3)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize(("op", "name"), ENTRIES)
def test_ops(benchmark: BenchmarkFixture, threads: int, op: str, name: str) -> None:
    benchmark.group = f"{op}, float32, {device().type}, {threads} threads"
    _time(benchmark, op, name, torch.float32)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("name", list(TABLE["sde_step"].contenders))
def test_sde_step_with_bfloat16_velocity(
    benchmark: BenchmarkFixture, threads: int, name: str
) -> None:
    benchmark.group = f"sde_step, bfloat16 velocity, {device().type}, {threads} threads"
    _time(benchmark, "sde_step", name, torch.bfloat16)
