"""GPU kernels of `sfgrpo::sde_step` and `sfgrpo::sde_step_x0`: guidance, noise, the affine step,
its log-density and, if asked for, the clean estimate, in one pass over the latents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    contiguous,
    finish_logp,
    gaussian_logp,
    launch,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    split_seed,
    sums_buffer,
    tile_at,
    tiling,
)
from sfgrpo.kernels.philox import row_noise


@triton.jit(do_not_specialize=["batch", "seed_lo", "seed_hi"])
def sde_step_kernel(
    x_ptr,
    v_ptr,
    coef_ptr,
    sample_ids_ptr,
    step_ids_ptr,
    v_uncond_ptr,
    noise_ptr,
    x_next_ptr,
    x0_hat_ptr,
    sums_ptr,
    seed_lo,
    seed_hi,
    guidance,
    batch,
    row_elements,
    chunks,
    ONE_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, chunk, start, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    a, b, n, t = load_coefficients(coef_ptr, rows, exists)
    x = load_float(x_ptr, offsets, mask)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    if noise_ptr is not None:
        noise = load_float(noise_ptr, offsets, mask)
    else:
        noise = row_noise(sample_ids_ptr, step_ids_ptr, rows, exists, start, seed_lo, seed_hi, COLS)
    mean = a[:, None] * x + b[:, None] * v
    stored = (mean + n[:, None] * noise).to(x_next_ptr.dtype.element_ty)
    tl.store(x_next_ptr + offsets, stored, mask=mask)
    if x0_hat_ptr is not None:
        x0_hat = x - t[:, None] * v
        tl.store(x0_hat_ptr + offsets, x0_hat.to(x0_hat_ptr.dtype.element_ty), mask=mask)
    # The density is that of the rounded value: it is what training will see.
    residual = tl.where(mask, stored.to(tl.float32) - mean, 0.0)
    result = tl.sum(residual * residual, axis=1)
    if ONE_CHUNK:
        result = gaussian_logp(result, n, row_elements, 1.0)
    tl.store(sums_ptr + rows * chunks + chunk, result, mask=exists)


def sde_step(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Next state `[B, ...]` in the dtype of `x` and its log-density `[B]` in fp32."""
    x_next, logp, _ = _step(
        x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, with_x0=False
    )
    return x_next, logp


def sde_step_x0(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sde_step`, and the clean estimate `x - t v` `[B, ...]` in the dtype of `x`."""
    x_next, logp, x0_hat = _step(
        x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, with_x0=True
    )
    assert x0_hat is not None
    return x_next, logp, x0_hat


def _step(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    *,
    with_x0: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, v, coef, sample_ids, step_ids, v_uncond, noise = contiguous(
        x, v, coef, sample_ids, step_ids, v_uncond, noise
    )
    batch = x.shape[0]
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x0_hat = torch.empty_like(x_next) if with_x0 else None
    logp = torch.zeros(batch, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return x_next, logp, x0_hat
    row_elements = x.numel() // batch
    cut = tiling(row_elements)
    sums = sums_buffer(logp, cut)
    launch(
        sde_step_kernel,
        cut.programs(batch),
        x,
        v,
        coef,
        sample_ids,
        step_ids,
        v_uncond,
        noise,
        x_next,
        x0_hat,
        sums,
        *split_seed(seed),
        guidance,
        batch,
        row_elements,
        cut.chunks,
        ONE_CHUNK=cut.chunks == 1,
        ROWS=cut.rows,
        COLS=cut.cols,
    )
    finish_logp(sums, coef, logp, row_elements, cut, scale=1.0)
    return x_next, logp, x0_hat


def _example(
    row_elements: int, *, guided: bool = False, noise: bool = False, with_x0: bool = False
) -> object:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    ids = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
    return (sde_step_x0 if with_x0 else sde_step)(
        x,
        v,
        rows_like(4),
        0,
        None if noise else ids,
        None if noise else ids,
        v if guided else None,
        4.5,
        x if noise else None,
    )


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "16x64x64 guided, x0_hat": lambda: _example(65536, guided=True, with_x0=True),
    "odd rows, noise given": lambda: _example(10007, noise=True),
    "56, guided": lambda: _example(56, guided=True),
    "1 element": lambda: _example(1),
}
