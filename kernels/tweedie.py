"""GPU kernel of `sfgrpo::tweedie`: the clean estimate `x - t v`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import contiguous, launch, load_float, rows_like, tile_at, tiling


@triton.jit(do_not_specialize=["batch"])
def tweedie_kernel(
    x_ptr,
    v_ptr,
    t_ptr,
    out_ptr,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    t = tl.load(t_ptr + rows, mask=exists, other=0.0)
    x0_hat = load_float(x_ptr, offsets, mask) - t[:, None] * load_float(v_ptr, offsets, mask)
    tl.store(out_ptr + offsets, x0_hat.to(out_ptr.dtype.element_ty), mask=mask)


def tweedie(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """`x - t v` `[B, ...]` in the dtype of `x`; `t [B]`."""
    x, v, t = contiguous(x, v, t)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    batch = x.shape[0]
    row_elements = x.numel() // batch
    cut = tiling(row_elements)
    launch(
        tweedie_kernel,
        cut.programs(batch),
        x,
        v,
        t,
        out,
        batch,
        row_elements,
        cut.chunks,
        ROWS=cut.rows,
        COLS=cut.cols,
    )
    return out


EXAMPLES = {
    "16x64x64": lambda: tweedie(
        rows_like(65536), rows_like(65536, torch.bfloat16), rows_like(1).squeeze(1)
    ),
}
