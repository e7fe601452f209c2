"""The last program to arrive finishes: sums over programs in a fixed order, within one launch
(in a captured CUDA graph, a fill of the counters and one launch).

Each program stores its share and then counts itself; the one that completes the count adds all
shares in an order that their number alone decides, so that the bits are the same in every run. It
then sets the counter back to 0, so that the next launch needs nothing cleared.

Why it sees every share:

* A share is a scalar. Triton stores it from thread 0, which is also the thread that counts, so
  share and count are in program order, and `acq_rel` at the scope of the device releases the one
  with the other. Nothing rests on the barrier between them, which on AMD waits for no store of
  another wave (`s_barrier` without `s_waitcnt vmcnt(0)`): do not publish a tensor this way.
* NVIDIA (PTX memory model): the counts of one counter form a release sequence, hence the last one
  synchronises with all before it. Its result reaches the other threads through shared memory and
  `bar.sync`, and causality order is transitive: their loads come after every share. `.cg` keeps
  these loads out of L1, where a line could have been read before (acquire drops those anyway).
* AMD gfx942, whose dies (XCDs) have an L2 each: LLVM makes the release `buffer_wbl2 sc1` and
  `s_waitcnt vmcnt(0)`, which writes thread 0's share back to memory all dies see, and the acquire
  `buffer_inv sc1`, which drops stale lines of the die's L2 and of the compute unit's L1. The
  other waves run on the same compute unit and load behind the barrier that hands them the count.

A count could also run on, taken modulo the number of chunks; but that number differs between calls
that share the counters, and no scheme on the device survives a foreign count anyway. A launch that
dies takes its counters along: they are out of `_AT_REST` while one is being made. A kernel that
dies takes the process's device context along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import device_function, gaussian_logp, launch, on_device_of, tiling

LEAST_COUNTERS = 4096

_AT_REST: dict[tuple[torch.device, int], Tensor] = {}
"""Counters that are all 0 between kernels, by device and stream."""


@contextlib.contextmanager
def zeroed_counters(like: Tensor, count: int) -> Iterator[Tensor]:
    """`count` int32 zeros on the device of `like`, which the launch inside must leave at 0.

    They belong to the current stream, whose kernels follow each other, and persist: the first call
    (and one that needs more) clears them, no other does. While a CUDA graph is being captured they
    come from the graph's own memory instead, cleared by a fill in the graph beside the op's kernel,
    since a replay may run beside calls on the capturing stream.
    """
    with on_device_of(like):
        accelerated = like.device.type not in ("cpu", "meta")
        if accelerated and torch.get_device_module(like.device).is_current_stream_capturing():
            yield torch.zeros(count, dtype=torch.int32, device=like.device)
            return
        stream = torch.accelerator.current_stream(like.device) if accelerated else None
        place = (like.device, 0 if stream is None else stream.stream_id)
        counters = _AT_REST.pop(place, None)
        if counters is None or counters.numel() < count:
            counters = _persistent_zeros(count, like.device, stream)
        yield counters
        _AT_REST[place] = counters


def _persistent_zeros(count: int, device: torch.device, stream: torch.Stream | None) -> Tensor:
    """Zeros that outlive the caller's memory pool, which may be that of a graph yet to be captured.

    Pools are a matter of the thread, hence one of its own (so are modes such as inference_mode).
    """
    size = max(LEAST_COUNTERS, 1 << (count - 1).bit_length())

    def allocate() -> Tensor:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        return torch.zeros(size, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


@device_function
def is_last(counter_ptr, count):
    """Count this program: whether it completes `count`. If so, what each stored before is visible.

    Only scalars stored before are, see above.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == count - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@device_function
def sum_shares(shares_ptr, count, COLS: tl.constexpr):
    """The sum of `count` numbers that other programs stored, in an order set by `count` alone."""
    total = tl.zeros([COLS], tl.float32)
    for start in range(0, count, COLS):
        index = start + tl.arange(0, COLS)
        total += tl.load(shares_ptr + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@device_function
def finish_logp(
    square, n, rows, exists, chunk, chunks, logp_ptr, shares_ptr, counters_ptr, row_elements, scale,
    COLS: tl.constexpr,
):  # fmt: skip
    """Store the log-densities, given this program's sums of squares `[ROWS]`.

    With `shares_ptr [B, chunks]` a row spans several programs, each of which holds one row.
    """
    if shares_ptr is None:
        logp = gaussian_logp(square, n, row_elements, scale)
        tl.store(logp_ptr + rows, logp, mask=exists)
    else:
        row = tl.sum(rows, axis=0)
        shares_ptr += row * chunks
        tl.store(shares_ptr + chunk, tl.sum(square, axis=0))
        if is_last(counters_ptr + row, chunks):
            total = sum_shares(shares_ptr, chunks, COLS)
            logp = gaussian_logp(total, tl.sum(n, axis=0), row_elements, scale)
            tl.store(logp_ptr + row, logp)


def launch_logp(kernel: Any, x: Tensor, *arguments: object, **constants: Any) -> Tensor:
    """Launch a kernel that ends in `finish_logp`, on the rows of `x`; the log-densities `[B]`.

    After `arguments` the kernel takes: log-densities, shares, counters, and the sizes.
    """
    batch = x.shape[0]
    logp = torch.empty(batch, dtype=torch.float32, device=x.device)
    if batch == 0:
        return logp
    row_elements = x.numel() // batch
    cut = tiling(row_elements)
    sizes = (batch, row_elements, cut.chunks)
    constants |= cut.constants
    if cut.chunks == 1:
        launch(kernel, cut.programs(batch), x, *arguments, logp, None, None, *sizes, **constants)
        return logp
    shares = torch.empty(batch, cut.chunks, dtype=torch.float32, device=x.device)
    with zeroed_counters(x, batch) as counters:
        results = (logp, shares, counters)
        launch(kernel, cut.programs(batch), x, *arguments, *results, *sizes, **constants)
    return logp
