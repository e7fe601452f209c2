"""What `sfgrpo::policy_loss` makes of a row once its sums over the latents are known."""

from __future__ import annotations

import triton.language as tl

from sfgrpo.kernels.common import device_function, gaussian_logp


@device_function
def finish_rows(
    square, gap, move, b, n, rows, exists, coef_ptr, coef_stride, logp_old_ptr, advantages_ptr,
    HAS_REFERENCE: tl.constexpr, HAS_OLD: tl.constexpr, clip_low, clip_high, kl_weight,
    kl_scale_ptr, weights_ptr, stats_ptr, back_ptr, batch, row_elements, GUARD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Store statistics and backward factors of `ROWS` rows, given their sums `square` of squared
    residuals, `gap` of squared differences to the reference and `move` of the old residual times
    the difference to the old velocity; return their weighted losses."""
    noisy = n > 0.0
    variance = tl.where(noisy, n * n, 1.0)
    elements = tl.maximum(row_elements, 1)
    advantage = tl.load(advantages_ptr + rows, mask=exists, other=0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + rows, mask=exists, other=0.0)
    else:
        noisy_rows = count_noisy(coef_ptr, coef_stride, batch, ROWS * COLS)
        weight = tl.full([ROWS], 1.0, tl.float32) / tl.maximum(noisy_rows, 1)
    weight = tl.where(noisy, weight, 0.0)

    logp = gaussian_logp(square, n, row_elements, 1.0)
    logp_old = logp
    if logp_old_ptr is not None:
        logp_old = tl.load(logp_old_ptr + rows, mask=exists, other=0.0)
    log_ratio = logp - logp_old
    slope = b / variance / elements
    if GUARD:
        log_ratio *= n
        slope *= n
    if HAS_OLD:
        log_ratio = b * move / tl.where(noisy, n, 1.0) / elements
    ratio = tl.where(noisy, tl.exp(log_ratio), 1.0)
    unclipped = advantage * ratio
    # A ratio that is nan must show in the loss: by default min and max return the other operand.
    limited = tl.maximum(ratio, 1.0 - clip_low, propagate_nan=tl.PropagateNan.ALL)
    limited = advantage * tl.minimum(limited, 1.0 + clip_high, propagate_nan=tl.PropagateNan.ALL)
    # Products, as -x is 0 - x to Triton, which for +0 is not the -0 of the reference.
    surrogate = -1.0 * tl.minimum(unclipped, limited, propagate_nan=tl.PropagateNan.ALL)
    surrogate = tl.where(noisy, surrogate, 0.0)
    clipped = noisy & (limited < unclipped)

    kl, g2 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if HAS_REFERENCE:
        if kl_scale_ptr is not None:
            kl_scale = tl.load(kl_scale_ptr + rows, mask=exists, other=0.0)
        else:
            kl_scale = b * b / (2.0 * variance)
        kl_scale = tl.where(noisy, kl_scale, 0.0)
        kl = kl_scale * gap / elements
        g2 = 2.0 * kl_weight * weight * kl_scale / elements
    # `noisy` once more, lest an advantage of nan on a row that takes no part reaches the gradient.
    g1 = tl.where(noisy, -1.0 * weight * unclipped * slope, 0.0)
    g1 = tl.where(clipped, 0.0, g1)

    tl.store(stats_ptr + rows * 5, logp, mask=exists)
    tl.store(stats_ptr + rows * 5 + 1, ratio, mask=exists)
    tl.store(stats_ptr + rows * 5 + 2, clipped.to(tl.float32), mask=exists)
    tl.store(stats_ptr + rows * 5 + 3, kl, mask=exists)
    tl.store(stats_ptr + rows * 5 + 4, surrogate, mask=exists)
    tl.store(back_ptr + rows * 2, g1, mask=exists)
    tl.store(back_ptr + rows * 2 + 1, g2, mask=exists)
    return weight * (surrogate + kl_weight * kl)


@device_function
def count_noisy(coef_ptr, coef_stride, batch, BLOCK: tl.constexpr):
    """The number of rows with n > 0."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch, BLOCK):
        row = start + tl.arange(0, BLOCK)
        at = row.to(tl.int64) * coef_stride + 2
        count += (tl.load(coef_ptr + at, mask=row < batch, other=0.0) > 0.0).to(tl.int32)
    return tl.sum(count, axis=0)
