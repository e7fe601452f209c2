"""GPU kernels of `sfgrpo::sde_logprob` and its backward: a Gaussian's log-density per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    contiguous,
    device_function,
    finish_logp,
    gaussian_logp,
    launch,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    sums_buffer,
    tile_at,
    tiling,
)


@triton.jit(do_not_specialize=["batch"])
def sde_logprob_kernel(
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    v_uncond_ptr,
    sums_ptr,
    guidance,
    scale,
    batch,
    row_elements,
    chunks,
    ONE_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, chunk, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    a, b, n, _ = load_coefficients(coef_ptr, rows, exists)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    residual = load_float(x_next_ptr, offsets, mask) - mean
    result = tl.sum(residual * residual, axis=1)
    if ONE_CHUNK:
        result = gaussian_logp(result, n, row_elements, scale)
    tl.store(sums_ptr + rows * chunks + chunk, result, mask=exists)


@triton.jit(do_not_specialize=["batch"])
def sde_logprob_backward_kernel(
    grad_ptr,
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    v_uncond_ptr,
    grad_x_ptr,
    grad_v_ptr,
    grad_x_next_ptr,
    grad_v_uncond_ptr,
    guidance,
    divisor,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    a, b, n, _ = load_coefficients(coef_ptr, rows, exists)
    noisy = n > 0.0
    variance = tl.where(noisy, n * n, 1.0)
    grad = tl.load(grad_ptr + rows, mask=exists, other=0.0)
    scale = tl.where(noisy, grad / variance / divisor, 0.0)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    grad_mean = scale[:, None] * (load_float(x_next_ptr, offsets, mask) - mean)
    share = 1.0
    if v_uncond_ptr is not None:
        share = guidance
    store_scaled(grad_x_ptr, offsets, mask, grad_mean, a)
    store_scaled(grad_v_ptr, offsets, mask, grad_mean, b * share)
    store_scaled(grad_v_uncond_ptr, offsets, mask, grad_mean, b * (1.0 - guidance))
    if grad_x_next_ptr is not None:
        tl.store(
            grad_x_next_ptr + offsets, (-grad_mean).to(grad_x_next_ptr.dtype.element_ty), mask=mask
        )


@device_function
def store_scaled(pointer, offsets, mask, tile, factor):
    """Store `factor [ROWS]` times `tile [ROWS, COLS]` where a gradient is wanted."""
    if pointer is not None:
        tl.store(
            pointer + offsets, (tile * factor[:, None]).to(pointer.dtype.element_ty), mask=mask
        )


def sde_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
) -> Tensor:
    """Log-density `[B]` in fp32 of `x_next` given `x` and `v`, per element or summed over them."""
    x, v, x_next, coef, v_uncond = contiguous(x, v, x_next, coef, v_uncond)
    batch = x.shape[0]
    logp = torch.zeros(batch, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return logp
    row_elements = x.numel() // batch
    scale = 1.0 if mean_reduction else float(row_elements)
    cut = tiling(row_elements)
    sums = sums_buffer(logp, cut)
    launch(
        sde_logprob_kernel,
        cut.programs(batch),
        x,
        v,
        x_next,
        coef,
        v_uncond,
        sums,
        guidance,
        scale,
        batch,
        row_elements,
        cut.chunks,
        ONE_CHUNK=cut.chunks == 1,
        ROWS=cut.rows,
        COLS=cut.cols,
    )
    finish_logp(sums, coef, logp, row_elements, cut, scale)
    return logp


def sde_logprob_backward(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
    need_x: bool,
    need_v: bool,
    need_x_next: bool,
    need_v_uncond: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in (x, v, x_next, v_uncond), in their dtypes; empty where not needed."""
    grad, x, v, x_next, coef, v_uncond = contiguous(grad, x, v, x_next, coef, v_uncond)
    wanted = ((x, need_x), (v, need_v), (x_next, need_x_next), (v_uncond, need_v_uncond))
    grads = [
        None if tensor is None or not needed else torch.empty_like(tensor)
        for tensor, needed in wanted
    ]
    if x.numel() > 0 and any(out is not None for out in grads):
        batch = x.shape[0]
        row_elements = x.numel() // batch
        cut = tiling(row_elements)
        launch(
            sde_logprob_backward_kernel,
            cut.programs(batch),
            grad,
            x,
            v,
            x_next,
            coef,
            v_uncond,
            *grads,
            guidance,
            float(row_elements) if mean_reduction else 1.0,
            batch,
            row_elements,
            cut.chunks,
            ROWS=cut.rows,
            COLS=cut.cols,
        )
    dx, dv, dx_next, dv_uncond = (x.new_empty(0) if out is None else out for out in grads)
    return dx, dv, dx_next, dv_uncond


def _example(row_elements: int, *, guided: bool = False) -> Tensor:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    return sde_logprob(x, v, x, rows_like(4), v if guided else None, 4.5, mean_reduction=True)


def _example_backward(row_elements: int, *, guided: bool = False) -> tuple[Tensor, ...]:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    needs = (guided, True, guided, guided)
    grad = rows_like(1).squeeze(1)
    return sde_logprob_backward(
        grad, x, v, x, rows_like(4), v if guided else None, 4.5, True, *needs
    )


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "56, guided": lambda: _example(56, guided=True),
    "backward 16x64x64": lambda: _example_backward(65536),
    "backward 56, guided, all gradients": lambda: _example_backward(56, guided=True),
}
