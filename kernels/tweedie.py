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
from sfgrpo.ops.tweedie import TweedieOperands


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
    ALIGN: tl.constexpr,
):
    """Every row's time is `time` unless `t_ptr` is given. `out_ptr` None: over `v`."""
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    if t_ptr is not None:
        times = tl.load(t_ptr + rows * t_stride, mask=exists, other=0.0)
    else:
        times = tl.zeros([ROWS], tl.float32) + time
    x0_hat = load_float(x_ptr, offsets, mask) - times[:, None] * load_float(v_ptr, offsets, mask)
    store_tile(out_ptr, v_ptr, offsets, mask, x0_hat)


def tweedie(o: TweedieOperands) -> Tensor:
    """`x - t v` `[B, ...]` in the dtype of `x`; `t [B]` or one `time`."""
    out = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device)
    _launch(contiguous(o, strided=("t",)), out)
    return out


def tweedie_(o: TweedieOperands) -> None:
    """Write `x - t v` over `v`, in the dtype of `v`."""
    rows = contiguous(o, strided=("t",))
    _launch(rows, None)
    copy_back(o.v, rows.v)


def _launch(o: TweedieOperands, out: Tensor | None) -> None:
    if o.x.numel() == 0:
        return
    batch = o.x.shape[0]
    row_elements = o.x.numel() // batch
    cut = tiling(row_elements)
    launch(
        tweedie_kernel,
        cut.programs(batch),
        o.x,
        o.v,
        o.t,
        0 if o.t is None else o.t.stride(0),
        o.time,
        out,
        batch,
        row_elements,
        cut.chunks,
        **cut.constants,
    )


def _example(*, in_place: bool) -> object:
    x, v = rows_like(65536), rows_like(65536, torch.bfloat16)
    t = None if in_place else rows_like(1).squeeze(1)
    return (tweedie_ if in_place else tweedie)(TweedieOperands(x, v, t, 0.5))


EXAMPLES = {
    "16x64x64": lambda: _example(in_place=False),
    "16x64x64 in place, one time": lambda: _example(in_place=True),
}
