"""GPU kernels of `sfgrpo::sde_logprob` and its backward: a Gaussian's log-density per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    coefficient_table,
    contiguous,
    device_function,
    launch,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    tile_at,
    tiling,
)
from sfgrpo.kernels.finish import finish_logp, launch_logp
from sfgrpo.ops.sde_logprob import LogprobBackwardOperands, LogprobOperands


@triton.jit(do_not_specialize=["batch", "coef_stride"])
def sde_logprob_kernel(
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    coef_stride,
    v_uncond_ptr,
    guidance,
    scale,
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
    rows, exists, chunk, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    a, b, n, _ = load_coefficients(coef_ptr, coef_stride, rows, exists)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    if mean_ptr is not None:
        tl.store(mean_ptr + offsets, mean, mask=mask)
    residual = load_float(x_next_ptr, offsets, mask) - mean
    finish_logp(
        tl.sum(residual * residual, axis=1), n, rows, exists, chunk, chunks, logp_ptr, shares_ptr,
        counters_ptr, row_elements, scale, COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "grad_stride", "coef_stride"])
def sde_logprob_backward_kernel(
    grad_ptr,
    grad_stride,
    grad_mean_ptr,
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    coef_stride,
    v_uncond_ptr,
    guidance,
    divisor,
    grad_x_ptr,
    grad_v_ptr,
    grad_x_next_ptr,
    grad_v_uncond_ptr,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    a, b, n, _ = load_coefficients(coef_ptr, coef_stride, rows, exists)
    noisy = n > 0.0
    variance = tl.where(noisy, n * n, 1.0)
    grad = tl.load(grad_ptr + rows * grad_stride, mask=exists, other=0.0)
    scale = grad / variance / divisor
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    residual = load_float(x_next_ptr, offsets, mask) - mean
    dlogp = tl.where(noisy[:, None], scale[:, None] * residual, 0.0)
    dmean = dlogp
    if grad_mean_ptr is not None:
        dmean += load_float(grad_mean_ptr, offsets, mask)
    share = 1.0
    if v_uncond_ptr is not None:
        share = guidance
    store_scaled(grad_x_ptr, offsets, mask, dmean, a)
    store_scaled(grad_v_ptr, offsets, mask, dmean, b * share)
    store_scaled(grad_x_next_ptr, offsets, mask, dlogp, tl.zeros_like(a) - 1.0)
    store_scaled(grad_v_uncond_ptr, offsets, mask, dmean, b * (1.0 - guidance))


@device_function
def store_scaled(pointer, offsets, mask, tile, factor):
    """Store `factor [ROWS]` times `tile [ROWS, COLS]` where a gradient is wanted."""
    if pointer is not None:
        tl.store(
            pointer + offsets, (tile * factor[:, None]).to(pointer.dtype.element_ty), mask=mask
        )


def sde_logprob(o: LogprobOperands) -> tuple[Tensor, Tensor]:
    """Log-density `[B]` of `x_next` given `x` and `v`, per element or summed, and the mean.

    Both in fp32; the mean is empty unless `with_mean`.
    """
    o = contiguous(o)
    mean = o.coef.new_empty(o.x.shape if o.with_mean else 0)
    logp = launch_logp(
        sde_logprob_kernel,
        o.x,
        o.v,
        o.x_next,
        *coefficient_table(o.coef),
        o.v_uncond,
        o.guidance,
        1.0 if o.mean_reduction else float(o.x[:1].numel()),
        mean if o.with_mean else None,
    )
    return logp, mean


def sde_logprob_backward(o: LogprobBackwardOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in (x, v, x_next, v_uncond), in their dtypes; empty where not needed."""
    o = contiguous(o, strided=("grad", "coef"))
    grads = [None if like is None else torch.empty_like(like) for like in o.wanted()]
    if o.x.numel() > 0 and any(out is not None for out in grads):
        batch = o.x.shape[0]
        row_elements = o.x.numel() // batch
        cut = tiling(row_elements)
        launch(
            sde_logprob_backward_kernel,
            cut.programs(batch),
            o.grad,
            o.grad.stride(0),
            o.grad_mean,
            o.x,
            o.v,
            o.x_next,
            *coefficient_table(o.coef),
            o.v_uncond,
            o.guidance,
            float(row_elements) if o.mean_reduction else 1.0,
            *grads,
            batch,
            row_elements,
            cut.chunks,
            **cut.constants,
        )
    dx, dv, dx_next, dv_uncond = (o.x.new_empty(0) if out is None else out for out in grads)
    return dx, dv, dx_next, dv_uncond


def _example(row_elements: int, *, guided: bool = False) -> object:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    v_uncond = v if guided else None
    return sde_logprob(LogprobOperands(x, v, x, rows_like(4), v_uncond, 4.5, True, guided))


def _example_backward(row_elements: int, *, guided: bool = False) -> object:
    x, v = rows_like(row_elements), rows_like(row_elements, torch.bfloat16)
    grads = (rows_like(1).squeeze(1), x if guided else None)
    operands = (x, v, x, rows_like(4), v if guided else None, 4.5, True)
    needs = (guided, True, guided, guided)
    return sde_logprob_backward(LogprobBackwardOperands(*grads, *operands, *needs))


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "16x64x64 guided, mean": lambda: _example(65536, guided=True),
    "56, guided, mean": lambda: _example(56, guided=True),
    "backward 16x64x64": lambda: _example_backward(65536),
    "backward 56, guided, all gradients": lambda: _example_backward(56, guided=True),
}
