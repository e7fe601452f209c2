"""Clocks, the speed of a plain copy, and peak memory, on the CPU and on accelerators.

On an accelerator a call is timed by events on its stream, so the host is not.  Before each call a
buffer larger than any cache is overwritten on the same stream: operands then come from memory, as
they do in training, where a network runs between two calls.  (Rotating buffers would need as much
memory and would leave the launch in the time.)  Behind it a kernel spins, longer than the host
takes to launch all kernels of a call: the host is ahead of the device when the spin ends, and the
first event, which stands in the stream behind the spin, comes when the call's kernels are queued.

On the CPU nothing is flushed: operands of one call, and those of the copy it is compared with,
are as warm as their size lets them be.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 512 * 2**20
"""Twice the largest cache of a GPU today (MI300's 256 MiB)."""

SPIN_CYCLES = 1_500_000
"""0.85 ms at 1.755 GHz, after 0.13 to 0.18 ms of overwriting.  Expected of the host: 0.24 ms for
a loss of ours and its backward, about three times that for the 116 launches of the peers'."""

SECONDS = 0.4
"""Time given to the rounds of one entry."""

ROUNDS = (5, 200)
"""At least and at most."""

COPY_SECONDS = 0.06


@cache
def device() -> torch.device:
    """This machine's accelerator, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


class Instant:
    """A point in the accelerator's stream; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event: Any = torch.get_device_module(device()).Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


def now() -> Any:
    """Something whose differences are seconds: the clock of pytest-benchmark here."""
    return time.perf_counter() if device().type == "cpu" else Instant()


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device())


def flush() -> None:
    """Before each timed call, see above."""
    if device().type != "cpu":
        _flush_buffer().zero_()
    if device().type == "cuda":  # ROCm's, too; other accelerators have no such kernel
        torch.cuda._sleep(SPIN_CYCLES)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    flush()
    start = now()
    call()
    return now() - start


def rounds(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of ``count`` calls, after two that are not timed."""
    for _ in range(2):
        call()
    return [seconds(call) for _ in range(count)]


def rounds_for(call: Callable[[], object], budget: float = SECONDS) -> int:
    """How many calls fit the time given to an entry."""
    once = min(seconds(call) for _ in range(2))
    least, most = ROUNDS
    return max(least, min(most, int(budget / max(once, 1e-9))))


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return low, middle, high


def copier(number_of_bytes: int) -> Callable[[], object]:
    """A plain copy that moves so many bytes: reads half of them and writes half."""
    source = torch.zeros(max(number_of_bytes // 8, 1), device=device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_seconds(number_of_bytes: int) -> float:
    """Median time of such a copy."""
    copy = copier(number_of_bytes)
    copy()
    return quantiles([seconds(copy) for _ in range(rounds_for(copy, COPY_SECONDS))])[1]


def peak_memory(call: Callable[[], object]) -> int:
    """Most bytes allocated at one time by a call, results included, operands not."""
    gc.collect()
    if device().type == "cpu":
        return peak_memory_of_cpu(call)
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    results = call()
    torch.accelerator.synchronize()
    del results
    return torch.accelerator.max_memory_allocated() - before


def peak_memory_of_cpu(call: Callable[[], object]) -> int:
    """From the profiler's record of PyTorch's allocator, which C++ extensions use as well.

    Memory from elsewhere (a ``std::vector``) is not seen, nor is the release of what was
    allocated before the profiler started.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log:
        results = call()
    del results
    profiler: Any = log.profiler
    events = profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda stamped: stamped[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak
