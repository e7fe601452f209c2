"""GPU kernel of `sfgrpo::tweedie` and `tweedie_`: the clean estimate `x - t v`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    contiguous,
    copy_back,
    launch,
    load_float,
    rows_like,
    store_tile,
    tile_at,
    tiling,
)


@triton.jit(do_not_specialize=["batch", "t_stride"])
def tweedie_kernel(
    x_ptr,
    v_ptr,
    t_ptr,
    t_stride,
    time,
    out_ptr,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Every row's time is `time` unless `t_ptr` is given. `out_ptr` None: over `v`."""
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    if t_ptr is not None:
        times = tl.load(t_ptr + rows * t_stride, mask=exists, other=0.0)
    else:
        times = tl.zeros([ROWS], tl.float32) + time
    x0_hat = load_float(x_ptr, offsets, mask) - times[:, None] * load_float(v_ptr, offsets, mask)
    store_tile(out_ptr, v_ptr, offsets, mask, x0_hat)


def tweedie(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> Tensor:
    """`x - t v` `[B, ...]` in the dtype of `x`; `t [B]` or one `time`."""
    x, v = contiguous(x, v)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, v, t, time, out)
    return out


def tweedie_(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> None:
    """Write `x - t v` over `v`, in the dtype of `v`."""
    x, written = contiguous(x, v)
    _launch(x, written, t, time, None)
    copy_back(v, written)


def _launch(x: Tensor, v: Tensor, t: Tensor | None, time: float, out: Tensor | None) -> None:
    if x.numel() == 0:
        return
    batch = x.shape[0]
    row_elements = x.numel() // batch
    cut = tiling(row_elements)
    launch(
        tweedie_kernel,
        cut.programs(batch),
        x,
        v,
        t,
        0 if t is None else t.stride(0),
        time,
        out,
        batch,
        row_elements,
        cut.chunks,
        ROWS=cut.rows,
        COLS=cut.cols,
    )


def _example(*, in_place: bool) -> object:
    x, v = rows_like(65536), rows_like(65536, torch.bfloat16)
    t = None if in_place else rows_like(1).squeeze(1)
    return (tweedie_ if in_place else tweedie)(x, v, t, 0.5)


EXAMPLES = {
    "16x64x64": lambda: _example(in_place=False),
    "16x64x64 in place, one time": lambda: _example(in_place=True),
}
