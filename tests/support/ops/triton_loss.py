"""Arguments of the loss for its Triton kernel, and what its results are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfgrpo.ops._backends import launcher
from sfgrpo.ops._library import REFERENCES
from tests.support.ops.triton_support import (
    EPS,
    coefficients,
    double,
    interpret,
    logp_error,
    residual_error,
    rows,
)

F32, BF16 = torch.float32, torch.bfloat16
BATCH = 7
NOISE_FREE = (2, 5)
CLIP = (0.02, 0.03)
KL_WEIGHT = 0.04

COLUMNS = ("logp", "ratio", "clipped", "kl", "surrogate")

loss_kernel = launcher("policy_loss")


def loss_arguments(
    row_elements: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, BF16),
    *,
    guided: bool = True,
    reference: bool = True,
    per_row: bool = False,
    guard: bool = False,
    recentred: bool = False,
) -> tuple[Any, ...]:
    """Rows of every kind: both signs of the advantage, ratios below, inside and above the clip."""
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    v_uncond = rows(BATCH, row_elements, dtypes[1], seed=2) if guided else None
    v_ref = rows(BATCH, row_elements, dtypes[1], seed=4) if reference else None
    coef = coefficients(BATCH, noise_free=NOISE_FREE)
    drift = coef[:, 0:1] * x + coef[:, 2:3] * rows(BATCH, row_elements, seed=3)
    x_next = drift.to(dtypes[0])
    logp, _ = REFERENCES["sde_logprob"](*double(x, v, x_next, coef, v_uncond, 1.5, True, False))
    offsets = torch.tensor([0.1, -0.1, 9.0, 0.005, -0.005, 9.0, 0.1])
    if guard:
        offsets /= torch.where(coef[:, 2] > 0, coef[:, 2], 1.0)
    advantages = torch.tensor([1.0, 1.5, 2.0, 0.7, -0.3, -1.0, -2.0])
    kl_scale = torch.linspace(0.5, 2, BATCH) if per_row else None
    weights = torch.linspace(0.1, 0.4, BATCH) if per_row else None
    logp_old = (logp - offsets).float()
    v_old = (v + rows(BATCH, row_elements, seed=5)).to(dtypes[1]) if recentred else None
    return (
        x, v, x_next, coef, logp_old, advantages, v_uncond, 1.5, v_ref, *CLIP, KL_WEIGHT,
        kl_scale, weights, False, guard, v_old,
    )  # fmt: skip


def check_loss(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel makes of them, checked against the reference in float64."""
    x, v, x_next, coef, _, advantages, v_uncond, guidance, v_ref = arguments[:9]
    loss, stats, back = interpret(loss_kernel, *arguments)
    exact_loss, exact, exact_back = REFERENCES["policy_loss"](*double(*arguments))
    noisy = coef[:, 2] > 0
    residual, bound = residual_error(x, v, x_next, coef, v_uncond, guidance)
    logp_bound = logp_error(residual, bound, coef[:, 2])
    # ratio and surrogate inherit the log-density's absolute error, relative to themselves.
    guard, v_old = arguments[15:]
    log_ratio_bound = logp_bound * (coef[:, 2] if guard else 1.0)
    if v_old is not None:
        log_ratio_bound = _re_centred_error(x, v, x_next, coef, v_uncond, guidance, v_old)
    relative = 2 * log_ratio_bound + 16 * EPS
    size = advantages.abs() * exact[:, 1].clamp(min=1)
    # The KL: differences of velocities, squared and summed.
    gap = bound / coef[:, 1:2].abs() + (v_ref.double().abs() * EPS if v_ref is not None else 0)
    kl_scale = (
        arguments[12]
        if arguments[12] is not None
        else coef[:, 1] ** 2 / (2 * torch.where(noisy, coef[:, 2], 1.0) ** 2)
    )
    spread = (exact[:, 3] / kl_scale).sqrt()
    rms = gap.square().mean(1).sqrt() if gap.shape[1] else torch.zeros(BATCH)
    kl_bound = kl_scale * (2 * spread * rms + rms**2) + 64 * EPS * exact[:, 3]
    limits = (logp_bound, relative * exact[:, 1], torch.zeros(BATCH), kl_bound, relative * size)
    for column, limit in enumerate(limits):
        error = (stats[:, column] - exact[:, column]).abs()
        assert (error <= torch.where(noisy, limit, 0.0)).all(), COLUMNS[column]
    weights = arguments[13] if arguments[13] is not None else torch.full((BATCH,), 1 / 5)
    loss_bound = weights * (relative * size + KL_WEIGHT * kl_bound) * noisy
    assert (loss - exact_loss).abs() <= loss_bound.sum() + 8 * EPS * exact_loss.abs()
    back_bound = (relative + 16 * EPS)[:, None] * exact_back.abs()
    assert ((back - exact_back).abs() <= back_bound).all()
    return loss, stats, back


def _re_centred_error(
    x: Tensor, v: Tensor, x_next: Tensor, coef: Tensor, v_uncond: Tensor | None, guidance: float,
    v_old: Tensor,
) -> Tensor:  # fmt: skip
    """Bound `[B]` on the fp32 error of b mean_D(noise move) / n; 0 for noise-free rows."""
    residual, bound = residual_error(x, v, x_next, coef, v_uncond, guidance)
    noise, noise_bound = residual_error(x, v_old, x_next, coef, None, 1.0)
    b, n = coef[:, 1:2].double(), coef[:, 2].double()
    move = ((noise - residual) / b).abs()
    move_bound = bound / b.abs() + 2 * EPS * v_old.double().abs()
    each = noise_bound * move + noise.abs() * move_bound + noise_bound * move_bound
    depth = np.log2(x.shape[1]) + 12
    error = b[:, 0].abs() * (each + depth * EPS * noise.abs() * move).mean(1)
    return torch.where(n > 0, error / torch.where(n > 0, n, 1.0), 0.0)
