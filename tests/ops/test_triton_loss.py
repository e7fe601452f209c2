"""Triton kernels of the loss against the references."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from sfgrpo.kernels import common, policy_loss
from sfgrpo.kernels.common import LaunchParameters
from sfgrpo.ops._backends import launcher
from sfgrpo.ops._library import REFERENCES
from tests.support.ops.triton_loss import (
    BATCH,
    CLIP,
    KL_WEIGHT,
    NOISE_FREE,
    check_loss,
    loss_arguments,
    loss_kernel,
)
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
sde_logprob = launcher("sde_logprob")
loss_backward, loss_backward_ = launcher("policy_loss_backward"), launcher("policy_loss_backward_")


@pytest.mark.parametrize("row_elements", [1, 3, 56, 65, 1024, 1025, 2500])
def test_loss_in_every_size(row_elements: int) -> None:
    _, stats, _ = check_loss(loss_arguments(row_elements))
    # Clipped: A > 0 above the range, A < 0 below it; noise-free rows hold 0, 1, 0, 0, 0.
    assert stats[:, 2].tolist() == [1, 0, 0, 0, 0, 0, 0]
    for row in NOISE_FREE:
        assert stats[row].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, BF16)])
@pytest.mark.parametrize(("guided", "reference", "per_row"), list(product([False, True], repeat=3)))
def test_loss_in_every_form(
    dtypes: tuple[torch.dtype, torch.dtype], guided: bool, reference: bool, per_row: bool
) -> None:
    check_loss(loss_arguments(70, dtypes, guided=guided, reference=reference, per_row=per_row))


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize("per_row", [False, True])
def test_loss_with_the_guards_ratio(row_elements: int, per_row: bool) -> None:
    _, stats, _ = check_loss(loss_arguments(row_elements, per_row=per_row, guard=True))
    # By its own log-ratio: .1 is clipped, .005 is not.
    assert stats[:, 2].tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("row_elements", [1, 3, 56, 1025, 2500])
@pytest.mark.parametrize(("guided", "reference"), [(True, True), (False, False)])
def test_loss_with_the_re_centred_ratio(row_elements: int, guided: bool, reference: bool) -> None:
    arguments = loss_arguments(
        row_elements, guided=guided, reference=reference, guard=True, recentred=True
    )
    _, stats, _ = check_loss(arguments)
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
    arguments = loss_arguments(
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
    arguments = loss_arguments(300, guard=True, recentred=True)
    latents = (*arguments[:4], *arguments[6:8])
    many = _many_rows(50)
    with mock.patch.object(common, "LAUNCH", small):
        check_loss(arguments)
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
    arguments = list(loss_arguments(70))
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
    arguments = list(loss_arguments(56))
    arguments[3] = coefficients(BATCH, noise_free=tuple(range(BATCH)))
    loss, stats, back = interpret(loss_kernel, *arguments)
    assert loss == 0
    assert torch.equal(stats, torch.tensor([[0.0, 1, 0, 0, 0]]).expand(BATCH, 5))
    assert torch.equal(back, torch.zeros(BATCH, 2))


def test_zeros_have_the_references_sign() -> None:
    """Triton makes -x of 0 - x, which is +0 where x is +0."""
    arguments = list(loss_arguments(56, per_row=True))
    arguments[5] = torch.tensor([1.0, 1.5, 2.0, 0.0, -0.0, 0.0, -0.0])
    arguments[13] = torch.tensor([0.0, -0.0, 0.1, 0.1, 0.1, 0.0, 0.1])
    for got, want in zip(
        interpret(loss_kernel, *arguments)[1:], REFERENCES["policy_loss"](*arguments)[1:],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got == 0, want == 0)
        assert torch.equal(got.signbit(), want.signbit())


def test_nan_reaches_the_loss() -> None:
    arguments = list(loss_arguments(56))
    arguments[4] = arguments[4].clone()
    arguments[4][0] = float("nan")
    loss, stats, back = interpret(loss_kernel, *arguments)
    assert loss.isnan()
    assert stats[0, [1, 4]].isnan().all()
    assert back[0, 0].isnan()
    assert not stats[1:].isnan().any()


def test_weights_of_noise_free_rows_are_never_looked_at() -> None:
    arguments = list(loss_arguments(56, per_row=True))
    want, _, want_back = interpret(loss_kernel, *arguments)
    arguments[13] = arguments[13].clone()
    arguments[13][list(NOISE_FREE)] = float("nan")
    loss, _, back = interpret(loss_kernel, *arguments)
    assert torch.equal(loss, want)
    assert torch.equal(back, want_back)
