"""Triton kernels of the step, its log-density and the clean estimate against the references."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo.kernels.sde_logprob import sde_logprob, sde_logprob_backward
from sfgrpo.kernels.sde_step import sde_step, sde_step_x0
from sfgrpo.kernels.tweedie import tweedie
from sfgrpo.ops.sde_logprob import sde_logprob_backward_reference, sde_logprob_reference
from sfgrpo.ops.sde_step import sde_step_x0_reference
from sfgrpo.ops.tweedie import tweedie_reference
from tests.ops.triton_support import (
    EPS,
    coefficients,
    double,
    interpret,
    logp_error,
    residual_error,
    rows,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [1, 3, 56, 63, 64, 65, 1023, 1024, 1025, 2500]
DTYPES = [(F32, BF16), (F32, F32), (BF16, BF16), (F16, F32), (BF16, F16)]
BATCH = 5
NOISE_FREE = (2,)
SEED = 2**40 + 17


def _step_arguments(
    row_elements: int, dtypes: tuple[torch.dtype, torch.dtype], *, guided: bool, given: bool
) -> tuple[Any, ...]:
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    v_uncond = rows(BATCH, row_elements, dtypes[1], seed=2) if guided else None
    coef = coefficients(BATCH, noise_free=NOISE_FREE)
    if given:
        noise = rows(BATCH, row_elements, BF16, seed=3)
        return x, v, coef, 0, None, None, v_uncond, 4.5, noise
    ids = torch.arange(BATCH) * 2**31
    return x, v, coef, SEED, ids, torch.arange(BATCH), v_uncond, 4.5, None


def _check_step(arguments: tuple[Any, ...]) -> None:
    x_next, logp, x0_hat = interpret(sde_step_x0, *arguments)
    expected, _, expected_x0 = sde_step_x0_reference(*arguments)
    assert torch.equal(x_next, expected)
    assert torch.equal(x0_hat, expected_x0)
    x, v, coef, *_, v_uncond, guidance, _ = arguments
    latents = (x, v, x_next, coef, v_uncond, guidance)
    exact = sde_logprob_reference(*double(*latents, True))
    n = coef[:, 2]
    assert ((logp - exact).abs() <= logp_error(*residual_error(*latents), n)).all()
    assert logp[NOISE_FREE[0]] == 0
    assert logp.dtype == F32


@pytest.mark.parametrize("row_elements", SIZES)
def test_step_in_every_size(row_elements: int) -> None:
    _check_step(_step_arguments(row_elements, (F32, BF16), guided=True, given=False))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("guided", "given"), list(product([False, True], repeat=2)))
def test_step_in_every_dtype_and_form(
    dtypes: tuple[torch.dtype, torch.dtype], guided: bool, given: bool
) -> None:
    _check_step(_step_arguments(70, dtypes, guided=guided, given=given))


def test_step_without_x0_is_the_same_step() -> None:
    arguments = _step_arguments(56, (F32, BF16), guided=True, given=False)
    x_next, logp = interpret(sde_step, *arguments)
    x_next_too, logp_too, _ = interpret(sde_step_x0, *arguments)
    assert torch.equal(x_next, x_next_too)
    assert torch.equal(logp, logp_too)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x, coef = torch.empty(shape), coefficients(shape[0])
    ids = torch.arange(shape[0])
    x_next, logp, x0_hat = sde_step_x0(x, x, coef, 0, ids, ids, None, 1.0, None)
    assert x_next.shape == x0_hat.shape == shape
    assert torch.equal(logp, torch.zeros(shape[0]))
    assert torch.equal(sde_logprob(x, x, x, coef, None, 1.0, True), torch.zeros(shape[0]))
    assert tweedie(x, x, logp).shape == shape
    needs = (True, True, True, False)
    grads = sde_logprob_backward(logp, x, x, x, coef, None, 1.0, True, *needs)
    assert [g.shape for g in grads] == [shape, shape, shape, (0,)]


def test_shape_is_kept_and_rows_may_be_strided() -> None:
    x = rows(4, 24).reshape(4, 2, 3, 4).transpose(1, 3)
    noise = rows(4, 24, seed=1).reshape(4, 4, 3, 2)
    coef = coefficients(8)[::2]
    x_next, logp = interpret(sde_step, x, x, coef, 0, None, None, None, 1.0, noise)
    expected, logp_expected = interpret(
        sde_step, x.contiguous(), x.contiguous(), coef.contiguous(), 0, None, None, None, 1.0, noise
    )
    assert x_next.shape == x.shape
    assert x_next.is_contiguous()
    assert torch.equal(x_next, expected)
    assert torch.equal(logp, logp_expected)


def _density_arguments(
    row_elements: int, dtypes: tuple[torch.dtype, torch.dtype], *, guided: bool
) -> tuple[Any, ...]:
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    v_uncond = rows(BATCH, row_elements, dtypes[1], seed=2) if guided else None
    coef = coefficients(BATCH, noise_free=NOISE_FREE)
    drift = coef[:, 0:1] * x + coef[:, 2:3] * rows(BATCH, row_elements, seed=3)
    return x, v, drift.to(dtypes[0]), coef, v_uncond, 1.5


@pytest.mark.parametrize("mean_reduction", [True, False])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize("row_elements", [1, 56, 65, 1025])
def test_logprob_against_float64(
    row_elements: int, dtypes: tuple[torch.dtype, torch.dtype], guided: bool, mean_reduction: bool
) -> None:
    latents = _density_arguments(row_elements, dtypes, guided=guided)
    logp = interpret(sde_logprob, *latents, mean_reduction)
    exact = sde_logprob_reference(*double(*latents, mean_reduction))
    bound = logp_error(*residual_error(*latents), latents[3][:, 2])
    scale = 1 if mean_reduction else row_elements
    assert ((logp - exact).abs() <= scale * bound + EPS * exact.abs()).all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize(("row_elements", "mean_reduction"), [(1, True), (56, False), (1025, True)])
def test_logprob_backward_against_float64(
    row_elements: int, mean_reduction: bool, dtypes: tuple[torch.dtype, torch.dtype], guided: bool
) -> None:
    latents = _density_arguments(row_elements, dtypes, guided=guided)
    x, v, x_next, coef, v_uncond, guidance = latents
    grad = torch.linspace(-1, 2, BATCH)
    options = (mean_reduction, True, True, True, guided)
    got = interpret(sde_logprob_backward, grad, *latents, *options)
    exact = sde_logprob_backward_reference(*double(grad, *latents, *options))
    _, bound = residual_error(*latents)
    divisor = row_elements if mean_reduction else 1
    noisy = coef[:, 2] > 0
    scale = torch.where(noisy, grad / coef[:, 2].square() / divisor, 0.0).abs().double()
    factors = (1.0, coef[:, 1].abs().max() * max(1.0, guidance), 1.0, coef[:, 1].abs().max())
    for tensor, g, e, factor in zip((x, v, x_next, v_uncond), got, exact, factors, strict=True):
        if tensor is None:
            assert g.numel() == 0
            continue
        assert g.dtype == tensor.dtype
        rounding = torch.finfo(tensor.dtype).eps / 2 + 8 * EPS
        tiny = torch.finfo(tensor.dtype).tiny
        error = float(factor) * scale[:, None] * bound * 2 + rounding * e.abs() + tiny
        assert ((g.double() - e).abs() <= error).all()
        assert torch.equal(g[NOISE_FREE[0]], torch.zeros_like(g[0]))


@pytest.mark.parametrize("needs", list(product([False, True], repeat=4)))
def test_only_wanted_gradients_are_written(needs: tuple[bool, bool, bool, bool]) -> None:
    latents = _density_arguments(70, (F32, BF16), guided=True)
    grad = torch.ones(BATCH)
    everything = interpret(sde_logprob_backward, grad, *latents, True, *(True,) * 4)
    some = interpret(sde_logprob_backward, grad, *latents, True, *needs)
    for wanted, full, part in zip(needs, everything, some, strict=True):
        assert torch.equal(part, full) if wanted else part.numel() == 0


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_tweedie(row_elements: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    t = torch.linspace(0, 1, BATCH)
    assert torch.equal(interpret(tweedie, x, v, t), tweedie_reference(x, v, t))


@pytest.mark.parametrize("row_elements", [56, 2500])
def test_bits_of_a_row_ignore_the_batch(row_elements: int) -> None:
    latents = _density_arguments(row_elements, (F32, BF16), guided=True)
    whole = interpret(sde_logprob, *latents, True)
    for row in range(BATCH):
        part = [a[row : row + 1] if isinstance(a, Tensor) else a for a in latents]
        assert torch.equal(interpret(sde_logprob, *part, True)[0], whole[row])


def test_noise_free_step_is_the_mean() -> None:
    x, v = rows(3, 56), rows(3, 56, seed=1)
    coef = coefficients(3, noise_free=(0, 1, 2))
    ids = torch.arange(3)
    x_next, logp = interpret(sde_step, x, v, coef, 0, ids, ids, None, 1.0, None)
    assert torch.equal(x_next, coef[:, 0:1] * x + coef[:, 1:2] * v)
    assert torch.equal(logp, torch.zeros(3))


def test_density_of_the_mean_is_its_maximum() -> None:
    """Known answer: at the mean the log-density is -ln n - ln(2 pi) / 2."""
    x, coef = torch.zeros(4, 56), coefficients(4)
    logp = interpret(sde_logprob, x, x, x, coef, None, 1.0, True)
    known = -coef[:, 2].double().log() - math.log(2 * math.pi) / 2
    assert ((logp - known).abs() <= 8 * EPS).all()
