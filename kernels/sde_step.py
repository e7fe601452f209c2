"""GPU kernel of `sfgrpo::sde_step` and `sde_step_`: guidance, noise, the affine step, its
log-density and, if asked for, the clean estimate and the mean, in one pass over the latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    coefficient_table,
    contiguous,
    copy_back,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    split_int64,
    store_tile,
    tile_at,
)
from sfgrpo.kernels.finish import finish_logp, launch_logp
from sfgrpo.kernels.philox import row_noise
from sfgrpo.ops.sde_step import StepOperands


@triton.jit(do_not_specialize=["batch", "coef_stride", "step", "seed_lo", "seed_hi"])
def sde_step_kernel(
    x_ptr,
    v_ptr,
    coef_ptr,
    coef_stride,
    seed_lo,
    seed_hi,
    sample_ids_ptr,
    step,
    step_ids_ptr,
    v_uncond_ptr,
    guidance,
    noise_ptr,
    x_next_ptr,
    x0_hat_ptr,
    mean_ptr,
    logp_ptr,
    shares_ptr,
    counters_ptr,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`x_next_ptr` None: over `x`."""
    rows, exists, chunk, start, offsets, mask = tile_at(
        batch, row_elements, chunks, ROWS, COLS, ALIGN
    )
    a, b, n, t = load_coefficients(coef_ptr, coef_stride, rows, exists)
    x = load_float(x_ptr, offsets, mask)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    if noise_ptr is not None:
        noise = load_float(noise_ptr, offsets, mask)
    else:
        noise = row_noise(
            sample_ids_ptr, step, step_ids_ptr, rows, exists, start, seed_lo, seed_hi, COLS
        )
    mean = a[:, None] * x + b[:, None] * v
    stored = store_tile(x_next_ptr, x_ptr, offsets, mask, mean + n[:, None] * noise)
    if x0_hat_ptr is not None:
        x0_hat = x - t[:, None] * v
        tl.store(x0_hat_ptr + offsets, x0_hat.to(x0_hat_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + offsets, mean, mask=mask)
    # The density is that of the rounded value: it is what training will see.
    residual = tl.where(mask, stored.to(tl.float32) - mean, 0.0)
    finish_logp(
        tl.sum(residual * residual, axis=1), n, rows, exists, chunk, chunks, logp_ptr, shares_ptr,
        counters_ptr, row_elements, 1.0, COLS,
    )  # fmt: skip


def sde_step(o: StepOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_next, logp `[B]`, x0_hat, mean): the mean in fp32 as logp, the others in x's dtype."""
    x_next = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device)
    mean = o.coef.new_empty(o.x.shape if o.with_mean else 0)
    logp, x0_hat = _launch(contiguous(o), x_next, mean if o.with_mean else None)
    return x_next, logp, x0_hat, mean


def sde_step_(o: StepOperands) -> tuple[Tensor, Tensor]:
    """As `sde_step`, with x_next written over `x`: (logp, x0_hat)."""
    rows = contiguous(o)
    results = _launch(rows, None, None)
    copy_back(o.x, rows.x)
    return results


def _launch(o: StepOperands, x_next: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x_next` None: over `x`. The second result is empty unless `with_x0`."""
    x0_hat = o.x.new_empty(o.x.shape if o.with_x0 else 0)
    logp = launch_logp(
        sde_step_kernel,
        o.x,
        o.v,
        *coefficient_table(o.coef),
        *split_int64(o.seed),
        o.sample_ids,
        split_int64(o.step)[0],
        o.step_ids,
        o.v_uncond,
        o.guidance,
        o.noise,
        x_next,
        x0_hat if o.with_x0 else None,
        mean,
    )
    return logp, x0_hat


def _example(
    row_elements: int,
    *,
    guided: bool = False,
    noise: bool = False,
    everything: bool = False,
    in_place: bool = False,
) -> object:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    ids = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
    o = StepOperands(
        x,
        v,
        rows_like(4),
        sample_ids=None if noise else ids,
        step=3,
        step_ids=ids if guided else None,
        v_uncond=v if guided else None,
        guidance=4.5,
        noise=x if noise else None,
        with_x0=everything,
        with_mean=everything and not in_place,
    )
    return sde_step_(o) if in_place else sde_step(o)


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "16x64x64 in place": lambda: _example(65536, in_place=True),
    "16x64x64 guided, x0_hat, mean": lambda: _example(65536, guided=True, everything=True),
    "odd rows, noise given": lambda: _example(10007, noise=True),
    "56, guided, in place": lambda: _example(56, guided=True, in_place=True),
    "1 element": lambda: _example(1),
}
