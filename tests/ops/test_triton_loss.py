"""Triton kernels of the loss against the references."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sfgrpo.kernels import common, policy_loss
from sfgrpo.kernels.common import LaunchParameters
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

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCH = 7
NOISE_FREE = (2, 5)
CLIP = (0.02, 0.03)
KL_WEIGHT = 0.04

loss_kernel, sde_logprob = launcher("policy_loss"), launcher("sde_logprob")
loss_backward, loss_backward_ = launcher("policy_loss_backward"), launcher("policy_loss_backward_")


def _loss_arguments(
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


def _check_loss(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
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
        assert (error <= torch.where(noisy, limit, 0.0)).all(), policy_loss_columns[column]
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


policy_loss_columns = ("logp", "ratio", "clipped", "kl", "surrogate")


@pytest.mark.parametrize("row_elements", [1, 3, 56, 65, 1024, 1025, 2500])
def test_loss_in_every_size(row_elements: int) -> None:
    _, stats, _ = _check_loss(_loss_arguments(row_elements))
    # Clipped: A > 0 above the range, A < 0 below it; noise-free rows hold 0, 1, 0, 0, 0.
    assert stats[:, 2].tolist() == [1, 0, 0, 0, 0, 0, 0]
    for row in NOISE_FREE:
        assert stats[row].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, BF16)])
@pytest.mark.parametrize(("guided", "reference", "per_row"), list(product([False, True], repeat=3)))
def test_loss_in_every_form(
    dtypes: tuple[torch.dtype, torch.dtype], guided: bool, reference: bool, per_row: bool
) -> None:
    _check_loss(_loss_arguments(70, dtypes, guided=guided, reference=reference, per_row=per_row))


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize("per_row", [False, True])
def test_loss_with_the_guards_ratio(row_elements: int, per_row: bool) -> None:
    _, stats, _ = _check_loss(_loss_arguments(row_elements, per_row=per_row, guard=True))
    # By its own log-ratio: .1 is clipped, .005 is not.
    assert stats[:, 2].tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("row_elements", [1, 3, 56, 1025, 2500])
@pytest.mark.parametrize(("guided", "reference"), [(True, True), (False, False)])
def test_loss_with_the_re_centred_ratio(row_elements: int, guided: bool, reference: bool) -> None:
    arguments = _loss_arguments(
        row_elements, guided=guided, reference=reference, guard=True, recentred=True
    )
    _, stats, _ = _check_loss(arguments)
    assert (stats[:, 1] != 1).sum() == BATCH - len(NOISE_FREE)
    other = list(arguments)
    other[4] = arguments[4] + 1.0
    assert torch.equal(interpret(loss_kernel, *other)[1], stats)  # whatever logp_old says


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize(("guided", "reference"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("recentred", [False, True])
def test_loss_backward_against_float64(
    row_elements: int, guided: bool, reference: bool, dtype: torch.dtype, recentred: bool
) -> None:
    arguments = _loss_arguments(
        row_elements, (F32, dtype), guided=guided, reference=reference, guard=recentred,
        recentred=recentred,
    )  # fmt: skip
    x, v, x_next, coef, _, _, v_uncond, guidance, v_ref = arguments[:9]
    v_old = arguments[-1]
    _, _, back = REFERENCES["policy_loss"](*double(*arguments))
    back = back.float()
    inputs = (torch.tensor(0.7), x, v, x_next, coef, back, v_uncond, guidance, v_ref, v_old)
    got = interpret(loss_backward, *inputs)
    written = [None if t is None else t.clone() for t in (v, v_uncond)]
    in_place = (*inputs[:2], written[0], *inputs[3:6], written[1], *inputs[7:])
    interpret(loss_backward_, *in_place)
    for tensor, gradient in zip(written, got, strict=True):
        assert tensor is None or torch.equal(tensor, gradient)
    exact = REFERENCES["policy_loss_backward"](*double(*inputs))
    _, bound = residual_error(x, v, x_next, coef, v_uncond, guidance)
    error = back[:, 0:1].abs() * bound
    if v_old is not None:
        _, old_bound = residual_error(x, v_old, x_next, coef, None, 1.0)
        error = back[:, 0:1].abs() * old_bound
    if v_ref is not None:
        gap = bound / coef[:, 1:2].abs() + 2 * EPS * v_ref.double().abs()
        error = error + back[:, 1:2].abs() * gap
    for tensor, g, e in zip((v, v_uncond), got, exact, strict=True):
        if tensor is None:
            assert g.numel() == 0
            continue
        assert g.dtype == tensor.dtype
        rounding = (torch.finfo(dtype).eps / 2 + 16 * EPS) * e.abs() + torch.finfo(dtype).tiny
        assert ((g.double() - e).abs() <= 2 * error + rounding).all()
        for row in NOISE_FREE:
            assert torch.equal(g[row], torch.zeros_like(g[row]))


def test_rows_of_many_chunks_and_a_loss_of_many_rows() -> None:
    """The loops over shares, rows and groups, which sizes that suit a test never enter."""
    small = LaunchParameters(tile_elements=16)
    arguments = _loss_arguments(300, guard=True, recentred=True)
    latents = (*arguments[:4], *arguments[6:8])
    many = _many_rows(50)
    with mock.patch.object(common, "LAUNCH", small):
        _check_loss(arguments)
        logp, _ = interpret(sde_logprob, *latents, True, False)
        loss, _, back = interpret(loss_kernel, *many)
    whole, _ = interpret(sde_logprob, *latents, True, False)
    bound = logp_error(*residual_error(*latents), arguments[3][:, 2])
    assert ((logp - whole).abs() <= 2 * bound).all()
    exact_loss, _, exact_back = REFERENCES["policy_loss"](*double(*many))
    assert (loss - exact_loss).abs() <= 1e-5 * exact_loss.abs()
    assert ((back - exact_back).abs() <= 1e-5 * exact_back.abs()).all()


def _many_rows(batch: int) -> tuple[Any, ...]:
    x, v, x_next = (0.1 * rows(batch, 3, seed=i) for i in range(3))
    row, coef = torch.ones(batch), coefficients(batch, noise_free=(2, 17))
    return (x, v, x_next, coef, row, row, None, 1.0, v + x, *CLIP, KL_WEIGHT, None, None, False)


def test_noisy_rows_are_counted_by_whom_it_is_cheap() -> None:
    """Beyond some number of rows PyTorch counts them; the results do not tell."""
    arguments = _many_rows(200)
    here = interpret(loss_kernel, *arguments)
    with mock.patch.object(policy_loss, "MOST_COUNTED_ROWS", 199):
        there = interpret(loss_kernel, *arguments)
    for one, other in zip(here, there, strict=True):
        assert torch.allclose(one, other, rtol=4 * EPS, atol=0)


def test_no_rows_and_no_elements() -> None:
    for batch, row_elements in ((0, 4), (3, 0)):
        x, coef, row = torch.empty(batch, row_elements), coefficients(batch), torch.ones(batch)
        arguments = (x, x, x, coef, row, row, None, 1.0, x, *CLIP, KL_WEIGHT, None, None, False)
        loss, stats, back = interpret(loss_kernel, *arguments)
        for got, want in zip(
            (loss, stats, back), REFERENCES["policy_loss"](*arguments), strict=True
        ):
            assert torch.allclose(got, want, rtol=8 * EPS, atol=0)
        grads = loss_backward(loss, x, x, x, coef, back, None, 1.0, None)
        assert [g.shape for g in grads] == [x.shape, (0,)]
        loss_backward_(loss, x, x.clone(), x, coef, back, None, 1.0, None)


def test_gradients_over_strided_velocities() -> None:
    arguments = list(_loss_arguments(70))
    x, v, x_next, coef, _, _, v_uncond, guidance, v_ref = arguments[:9]
    back = coefficients(BATCH)[:, :2]
    inputs = (torch.tensor(0.7), x, v, x_next, coef, back, v_uncond, guidance, v_ref)
    want = interpret(loss_backward, *inputs)
    strided = [torch.stack((t, t), 2)[:, :, 0] for t in (v, v_uncond)]
    in_place = (*inputs[:2], strided[0], *inputs[3:6], strided[1], *inputs[7:])
    interpret(loss_backward_, *in_place)
    for got, expected in zip(strided, want, strict=True):
        assert not got.is_contiguous()
        assert torch.equal(got, expected)


def test_only_noise_free_rows() -> None:
    arguments = list(_loss_arguments(56))
    arguments[3] = coefficients(BATCH, noise_free=tuple(range(BATCH)))
    loss, stats, back = interpret(loss_kernel, *arguments)
    assert loss == 0
    assert torch.equal(stats, torch.tensor([[0.0, 1, 0, 0, 0]]).expand(BATCH, 5))
    assert torch.equal(back, torch.zeros(BATCH, 2))


def test_zeros_have_the_references_sign() -> None:
    """Triton makes -x of 0 - x, which is +0 where x is +0."""
    arguments = list(_loss_arguments(56, per_row=True))
    arguments[5] = torch.tensor([1.0, 1.5, 2.0, 0.0, -0.0, 0.0, -0.0])
    arguments[13] = torch.tensor([0.0, -0.0, 0.1, 0.1, 0.1, 0.0, 0.1])
    for got, want in zip(
        interpret(loss_kernel, *arguments)[1:], REFERENCES["policy_loss"](*arguments)[1:],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got == 0, want == 0)
        assert torch.equal(got.signbit(), want.signbit())


def test_nan_reaches_the_loss() -> None:
    arguments = list(_loss_arguments(56))
    arguments[4] = arguments[4].clone()
    arguments[4][0] = float("nan")
    loss, stats, back = interpret(loss_kernel, *arguments)
    assert loss.isnan()
    assert stats[0, [1, 4]].isnan().all()
    assert back[0, 0].isnan()
    assert not stats[1:].isnan().any()


def test_weights_of_noise_free_rows_are_never_looked_at() -> None:
    arguments = list(_loss_arguments(56, per_row=True))
    want, _, want_back = interpret(loss_kernel, *arguments)
    arguments[13] = arguments[13].clone()
    arguments[13][list(NOISE_FREE)] = float("nan")
    loss, _, back = interpret(loss_kernel, *arguments)
    assert torch.equal(loss, want)
    assert torch.equal(back, want_back)
