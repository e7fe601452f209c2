"""GPU kernels of `sfgrpo::policy_loss` and its backward.

Forward: one pass over the latents. The last program of a row turns the row's two sums into its
statistics and its share of the loss; the last of these programs adds the shares in a fixed order.
Backward: one pass, affine in the latents with two numbers per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    ceil_div,
    coefficient_table,
    contiguous,
    copy_back,
    launch,
    load_coefficients,
    load_float,
    load_velocity,
    rows_like,
    store_tile,
    tile_at,
    tiling,
)
from sfgrpo.kernels.finish import is_last, sum_shares, zeroed_counters
from sfgrpo.kernels.policy_rows import finish_rows
from sfgrpo.ops._policy_operands import PolicyBackwardOperands, PolicyOperands

MOST_COUNTED_ROWS = 8192
"""Without weights every program that finishes rows counts the noisy rows of the whole batch. Beyond
this many that would cost more than PyTorch's launches, which then make the weights first."""


@triton.jit(do_not_specialize=["batch", "coef_stride", "groups"])
def policy_loss_kernel(
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    coef_stride,
    logp_old_ptr,
    advantages_ptr,
    v_uncond_ptr,
    guidance,
    v_ref_ptr,
    clip_low,
    clip_high,
    kl_weight,
    kl_scale_ptr,
    weights_ptr,
    v_old_ptr,
    loss_ptr,
    stats_ptr,
    back_ptr,
    shares_ptr,
    counters_ptr,
    groups,
    batch,
    row_elements,
    chunks,
    GUARD: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`groups` of `ROWS` rows each have a share of the loss and, if a row is `SPLIT` over several
    programs, three shares and a counter per row; the first counter is the loss's."""
    rows, exists, chunk, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    a, b, n, _ = load_coefficients(coef_ptr, coef_stride, rows, exists)
    v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    kept = a[:, None] * load_float(x_ptr, offsets, mask)
    x_next = load_float(x_next_ptr, offsets, mask)
    residual = x_next - (kept + b[:, None] * v)
    square = tl.sum(residual * residual, axis=1)
    gap, move = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if v_ref_ptr is not None:
        difference = v - load_float(v_ref_ptr, offsets, mask)
        gap = tl.sum(difference * difference, axis=1)
    if v_old_ptr is not None:
        v_old = load_float(v_old_ptr, offsets, mask)
        move = tl.sum((x_next - (kept + b[:, None] * v_old)) * (v - v_old), axis=1)

    group = (tl.program_id(0).to(tl.uint32) // tl.cast(chunks, tl.uint32)).to(tl.int32)
    row_shares_ptr = shares_ptr + groups + group.to(tl.int64) * chunks * 3
    finishes = True
    if SPLIT:
        tl.store(row_shares_ptr + chunk, tl.sum(square, axis=0))
        tl.store(row_shares_ptr + chunks + chunk, tl.sum(gap, axis=0))
        tl.store(row_shares_ptr + 2 * chunks + chunk, tl.sum(move, axis=0))
        finishes = is_last(counters_ptr + 1 + group, chunks)
    if finishes:
        if SPLIT:
            square = tl.zeros([ROWS], tl.float32) + sum_shares(row_shares_ptr, chunks, COLS)
            if v_ref_ptr is not None:
                gap = tl.zeros([ROWS], tl.float32) + sum_shares(
                    row_shares_ptr + chunks, chunks, COLS
                )
            if v_old_ptr is not None:
                move = tl.zeros([ROWS], tl.float32) + sum_shares(
                    row_shares_ptr + 2 * chunks, chunks, COLS
                )
        losses = finish_rows(
            square, gap, move, b, n, rows, exists, coef_ptr, coef_stride, logp_old_ptr,
            advantages_ptr, v_ref_ptr is not None, v_old_ptr is not None, clip_low, clip_high,
            kl_weight, kl_scale_ptr, weights_ptr, stats_ptr, back_ptr, batch, row_elements, GUARD,
            ROWS, COLS,
        )  # fmt: skip
        tl.store(shares_ptr + group, tl.sum(losses, axis=0))
        if is_last(counters_ptr, groups):
            tl.store(loss_ptr, sum_shares(shares_ptr, groups, ROWS * COLS))


@triton.jit(do_not_specialize=["batch", "coef_stride"])
def policy_loss_backward_kernel(
    grad_loss_ptr,
    x_ptr,
    v_ptr,
    x_next_ptr,
    coef_ptr,
    coef_stride,
    back_ptr,
    v_uncond_ptr,
    guidance,
    v_ref_ptr,
    v_old_ptr,
    grad_v_ptr,
    grad_v_uncond_ptr,
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Gradients in `v` and `v_uncond`; over them where the pointer of the gradient is None."""
    rows, exists, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    a, b, _, _ = load_coefficients(coef_ptr, coef_stride, rows, exists)
    grad_loss = tl.load(grad_loss_ptr)
    g1 = grad_loss * tl.load(back_ptr + rows * 2, mask=exists, other=0.0)
    g2 = grad_loss * tl.load(back_ptr + rows * 2 + 1, mask=exists, other=0.0)
    if v_old_ptr is None or v_ref_ptr is not None:
        v = load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask)
    if v_old_ptr is not None:
        scored = load_float(v_old_ptr, offsets, mask)
    else:
        scored = v
    mean = a[:, None] * load_float(x_ptr, offsets, mask) + b[:, None] * scored
    grad = g1[:, None] * (load_float(x_next_ptr, offsets, mask) - mean)
    if v_ref_ptr is not None:
        grad += g2[:, None] * (v - load_float(v_ref_ptr, offsets, mask))
    if v_uncond_ptr is not None:
        store_tile(grad_v_uncond_ptr, v_uncond_ptr, offsets, mask, (1.0 - guidance) * grad)
        grad = guidance * grad
    store_tile(grad_v_ptr, v_ptr, offsets, mask, grad)


def policy_loss(o: PolicyOperands) -> tuple[Tensor, Tensor, Tensor]:
    """Scalar loss, statistics `[B, 5]` and backward factors `[B, 2]`, all fp32."""
    o = contiguous(o)
    batch = o.x.shape[0]
    weights = o.weights
    if weights is None and batch > MOST_COUNTED_ROWS:
        noisy = o.coef[:, 2] > 0
        weights = noisy / noisy.sum().clamp(min=1)
    row_elements = o.x.numel() // max(batch, 1)
    cut = tiling(row_elements)
    # Without rows one program still says that the loss is 0.
    groups = max(ceil_div(batch, cut.rows), 1)
    split = cut.chunks > 1
    loss = o.coef.new_empty(())
    stats, back = o.coef.new_empty(batch, 5), o.coef.new_empty(batch, 2)
    shares = o.coef.new_empty(groups + (3 * batch * cut.chunks if split else 0))
    with zeroed_counters(o.x, 1 + (batch if split else 0)) as counters:
        launch(
            policy_loss_kernel,
            (groups * cut.chunks,),
            o.x,
            o.v,
            o.x_next,
            *coefficient_table(o.coef),
            o.logp_old,
            o.advantages,
            o.v_uncond,
            o.guidance,
            o.v_ref,
            o.clip_low,
            o.clip_high,
            o.kl_weight,
            o.kl_scale,
            weights,
            o.v_old,
            *(loss, stats, back, shares, counters),
            *(groups, batch, row_elements, cut.chunks),
            GUARD=o.guard,
            SPLIT=split,
            **cut.constants,
        )
    return loss, stats, back


def policy_loss_backward(o: PolicyBackwardOperands) -> tuple[Tensor, Tensor]:
    """Gradients in `v` and `v_uncond`, in their dtypes; the second is empty without `v_uncond`."""
    grad_v = o.v.new_empty(o.v.shape)
    grad_v_uncond = None if o.v_uncond is None else o.v_uncond.new_empty(o.v_uncond.shape)
    _launch_backward(contiguous(o), grad_v, grad_v_uncond)
    return grad_v, o.v.new_empty(0) if grad_v_uncond is None else grad_v_uncond


def policy_loss_backward_(o: PolicyBackwardOperands) -> None:
    """Write the gradients over `v` and `v_uncond`."""
    rows = contiguous(o)
    _launch_backward(rows, None, None)
    copy_back(o.v, rows.v)
    copy_back(o.v_uncond, rows.v_uncond)


def _launch_backward(
    o: PolicyBackwardOperands, grad_v: Tensor | None, grad_v_uncond: Tensor | None
) -> None:
    if o.x.numel() == 0:
        return
    batch = o.x.shape[0]
    row_elements = o.x.numel() // batch
    cut = tiling(row_elements)
    launch(
        policy_loss_backward_kernel,
        cut.programs(batch),
        o.grad_loss,
        o.x,
        o.v,
        o.x_next,
        *coefficient_table(o.coef),
        o.back,
        o.v_uncond,
        o.guidance,
        o.v_ref,
        o.v_old,
        grad_v,
        grad_v_uncond,
        batch,
        row_elements,
        cut.chunks,
        **cut.constants,
    )


def _example(row_elements: int, *, full: bool = False, recentred: bool = False) -> object:
    """With `full`, everything optional but `v_old` is given, the ratio is GRPO-Guard's and the
    gradients are written in place."""
    x, v, coef = rows_like(row_elements), rows_like(row_elements, torch.bfloat16), rows_like(4)
    row = rows_like(1).squeeze(1)
    extra = v if full else None
    per_row = (row, row) if full else (None, None)
    v_old = v if recentred else None
    loss, _, back = policy_loss(
        PolicyOperands(
            x, v, x, coef, row, row, extra, 4.5, extra, 1e-4, 1e-4, 0.04, *per_row,
            reuse_v=full, guard=full, v_old=v_old,
        )
    )  # fmt: skip
    backward = policy_loss_backward_ if full else policy_loss_backward
    return backward(PolicyBackwardOperands(loss, x, v, x, coef, back, extra, 4.5, extra, v_old))


EXAMPLES = {
    "16x64x64": lambda: _example(65536),
    "16x64x64 guided, reference": lambda: _example(65536, full=True),
    "16x64x64 guided, reference, re-centred": lambda: _example(65536, full=True, recentred=True),
    "56, guided, reference": lambda: _example(56, full=True),
    "1 element": lambda: _example(1),
}
