"""GPU kernels of `sfgrpo::policy_loss` and its backward.

Forward: one pass over the latents leaves two sums per row and chunk; from these follow the rows'
statistics and their shares of the loss, which a last program adds in a fixed order.
Backward: one pass, affine in the latents with two numbers per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    LAUNCH,
    ceil_div,
    contiguous,
    gaussian_logp,
    launch,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    sum_partials,
    tile_at,
    tiling,
)


@triton.jit(do_not_specialize=["batch"])
def policy_loss_tiles_kernel(
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    v_uncond_ptr,
    v_ref_ptr,
    sums_ptr,
    guidance,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, chunk, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    a, b, _, _ = load_coefficients(coef_ptr, rows, exists)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    residual = load_float(x_next_ptr, offsets, mask) - mean
    at = (rows * chunks + chunk) * 2
    tl.store(sums_ptr + at, tl.sum(residual * residual, axis=1), mask=exists)
    if v_ref_ptr is not None:
        difference = v - load_float(v_ref_ptr, offsets, mask)
        tl.store(sums_ptr + at + 1, tl.sum(difference * difference, axis=1), mask=exists)


@triton.jit(do_not_specialize=["batch"])
def policy_loss_rows_kernel(
    sums_ptr,
    coef_ptr,
    logp_old_ptr,
    advantages_ptr,
    kl_scale_ptr,
    weights_ptr,
    noisy_rows_ptr,
    stats_ptr,
    back_ptr,
    losses_ptr,
    clip_low,
    clip_high,
    kl_weight,
    batch,
    row_elements,
    chunks,
    HAS_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < batch
    _, b, n, _ = load_coefficients(coef_ptr, rows, exists)
    noisy = n > 0.0
    variance = tl.where(noisy, n * n, 1.0)
    elements = tl.maximum(row_elements, 1)
    logp_old = tl.load(logp_old_ptr + rows, mask=exists, other=0.0)
    advantage = tl.load(advantages_ptr + rows, mask=exists, other=0.0)

    square = sum_partials(sums_ptr, rows, exists, chunks, 2, ROWS, COLS)
    logp = gaussian_logp(square, n, row_elements, 1.0)
    ratio = tl.where(noisy, tl.exp(logp - logp_old), 1.0)
    unclipped = advantage * ratio
    # A ratio that is nan must show in the loss: by default min and max return the other operand.
    limited = tl.maximum(ratio, 1.0 - clip_low, propagate_nan=tl.PropagateNan.ALL)
    limited = advantage * tl.minimum(limited, 1.0 + clip_high, propagate_nan=tl.PropagateNan.ALL)
    surrogate = -tl.minimum(unclipped, limited, propagate_nan=tl.PropagateNan.ALL)
    surrogate = tl.where(noisy, surrogate, 0.0)
    clipped = noisy & (limited < unclipped)

    kl_scale = b * b / (2.0 * variance)
    if kl_scale_ptr is not None:
        kl_scale = tl.load(kl_scale_ptr + rows, mask=exists, other=0.0)
    kl = tl.zeros([ROWS], tl.float32)
    if HAS_REFERENCE:
        kl_scale = tl.where(noisy, kl_scale, 0.0)
        kl = kl_scale * sum_partials(sums_ptr + 1, rows, exists, chunks, 2, ROWS, COLS) / elements
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + rows, mask=exists, other=0.0)
    else:
        weight = tl.full([ROWS], 1.0, tl.float32) / tl.maximum(tl.load(noisy_rows_ptr), 1)
    weight = tl.where(noisy, weight, 0.0)

    tl.store(stats_ptr + rows * 5, logp, mask=exists)
    tl.store(stats_ptr + rows * 5 + 1, ratio, mask=exists)
    tl.store(stats_ptr + rows * 5 + 2, clipped.to(tl.float32), mask=exists)
    tl.store(stats_ptr + rows * 5 + 3, kl, mask=exists)
    tl.store(stats_ptr + rows * 5 + 4, surrogate, mask=exists)
    # `noisy` once more, lest an advantage of nan on a row that takes no part reaches the gradient.
    g1 = tl.where(noisy, -weight * unclipped * b / variance / elements, 0.0)
    g1 = tl.where(clipped, 0.0, g1)
    g2 = tl.zeros([ROWS], tl.float32)
    if HAS_REFERENCE:
        g2 = 2.0 * kl_weight * weight * kl_scale / elements
    tl.store(back_ptr + rows * 2, g1, mask=exists)
    tl.store(back_ptr + rows * 2 + 1, g2, mask=exists)
    tl.store(losses_ptr + rows, weight * (surrogate + kl_weight * kl), mask=exists)


@triton.jit(do_not_specialize=["batch"])
def policy_loss_sum_kernel(losses_ptr, loss_ptr, batch, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(loss_ptr + row, sum_partials(losses_ptr, row, row >= 0, batch, 1, 1, COLS))


@triton.jit(do_not_specialize=["batch"])
def policy_loss_backward_kernel(
    grad_loss_ptr,
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    back_ptr,
    v_uncond_ptr,
    v_ref_ptr,
    grad_v_ptr,
    grad_v_uncond_ptr,
    guidance,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS)
    a, b, _, _ = load_coefficients(coef_ptr, rows, exists)
    grad_loss = tl.load(grad_loss_ptr)
    g1 = grad_loss * tl.load(back_ptr + rows * 2, mask=exists, other=0.0)
    g2 = grad_loss * tl.load(back_ptr + rows * 2 + 1, mask=exists, other=0.0)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * v
    grad = g1[:, None] * (load_float(x_next_ptr, offsets, mask) - mean)
    if v_ref_ptr is not None:
        grad += g2[:, None] * (v - load_float(v_ref_ptr, offsets, mask))
    if v_uncond_ptr is not None:
        grad_v_uncond = ((1.0 - guidance) * grad).to(grad_v_uncond_ptr.dtype.element_ty)
        tl.store(grad_v_uncond_ptr + offsets, grad_v_uncond, mask=mask)
        grad = guidance * grad
    tl.store(grad_v_ptr + offsets, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def policy_loss(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    v_ref: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    kl_scale: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scalar loss, statistics `[B, 5]` and backward factors `[B, 2]`, all fp32."""
    x, v, x_next, coef, v_uncond, v_ref = contiguous(x, v, x_next, coef, v_uncond, v_ref)
    batch = x.shape[0]
    loss = coef.new_zeros(())
    stats, back = coef.new_empty(batch, 5), coef.new_empty(batch, 2)
    if batch == 0:
        return loss, stats, back
    row_elements = x.numel() // batch
    cut = tiling(row_elements)
    sums, losses = coef.new_empty(batch, cut.chunks, 2), coef.new_empty(batch)
    launch(
        policy_loss_tiles_kernel,
        cut.programs(batch),
        x,
        v,
        x_next,
        coef,
        v_uncond,
        v_ref,
        sums,
        guidance,
        batch,
        row_elements,
        cut.chunks,
        ROWS=cut.rows,
        COLS=cut.cols,
    )
    launch(
        policy_loss_rows_kernel,
        (ceil_div(batch, LAUNCH.finish_rows),),
        sums,
        coef,
        *contiguous(logp_old, advantages, kl_scale, weights),
        # Counted on the device: a number on the host would make it wait.
        None if weights is not None else torch.count_nonzero(coef[:, 2]),
        stats,
        back,
        losses,
        clip_low,
        clip_high,
        kl_weight,
        batch,
        row_elements,
        cut.chunks,
        HAS_REFERENCE=v_ref is not None,
        ROWS=LAUNCH.finish_rows,
        COLS=LAUNCH.finish_cols,
    )
    launch(policy_loss_sum_kernel, (1,), losses, loss, batch, COLS=LAUNCH.tile_elements)
    return loss, stats, back


def policy_loss_backward(
    grad_loss: Tensor,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    back: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    v_ref: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in `v` and `v_uncond`, in their dtypes; the second is empty without `v_uncond`."""
    latents = contiguous(grad_loss, x, v, x_next, coef, back, v_uncond, v_ref)
    x, v, v_uncond = latents[1], latents[2], latents[6]
    grad_v = torch.empty_like(v)
    grad_v_uncond = None if v_uncond is None else torch.empty_like(v_uncond)
    if x.numel() > 0:
        batch = x.shape[0]
        row_elements = x.numel() // batch
        cut = tiling(row_elements)
        launch(
            policy_loss_backward_kernel,
            cut.programs(batch),
            *latents,
            grad_v,
            grad_v_uncond,
            guidance,
            batch,
            row_elements,
            cut.chunks,
            ROWS=cut.rows,
            COLS=cut.cols,
        )
    return grad_v, v.new_empty(0) if grad_v_uncond is None else grad_v_uncond


def _example(row_elements: int, *, full: bool = False) -> object:
    """With `full`, everything optional is given and both directions run."""
    x, v, coef = rows_like(row_elements), rows_like(row_elements, torch.bfloat16), rows_like(4)
    row = rows_like(1).squeeze(1)
    extra = v if full else None
    per_row = (row, row) if full else (None, None)
    loss, _, back = policy_loss(
        x, v, x, coef, row, row, extra, 4.5, extra, 1e-4, 1e-4, 0.04, *per_row
    )
    return policy_loss_backward(loss, x, v, x, coef, back, extra, 4.5, extra)


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "16x64x64 guided, reference": lambda: _example(65536, full=True),
    "56, guided, reference": lambda: _example(56, full=True),
    "1 element": lambda: _example(1),
}
