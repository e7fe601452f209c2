"""Triton kernels of the step, its log-density and the clean estimate against the references."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
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

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [1, 3, 56, 63, 64, 65, 1023, 1024, 1025, 2500]
DTYPES = [(F32, BF16), (F32, F32), (BF16, BF16), (F16, F32), (BF16, F16)]
BATCH = 5
NOISE_FREE = (2,)
SEED = 2**40 + 17

sde_step, sde_step_ = launcher("sde_step"), launcher("sde_step_")
sde_logprob, sde_logprob_backward = launcher("sde_logprob"), launcher("sde_logprob_backward")
tweedie, tweedie_ = launcher("tweedie"), launcher("tweedie_")


def _step_arguments(
    row_elements: int, dtypes: tuple[torch.dtype, torch.dtype], *, guided: bool, given: bool
) -> tuple[Any, ...]:
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    v_uncond = rows(BATCH, row_elements, dtypes[1], seed=2) if guided else None
    coef = coefficients(BATCH, noise_free=NOISE_FREE)
    if given:
        noise = rows(BATCH, row_elements, BF16, seed=3)
        return x, v, coef, 0, None, 0, None, v_uncond, 4.5, noise
    ids = torch.arange(BATCH) * 2**31
    return x, v, coef, SEED, ids, 0, torch.arange(BATCH), v_uncond, 4.5, None


def _check_step(arguments: tuple[Any, ...]) -> None:
    everything: tuple[Any, ...] = (*arguments, True, True)
    x_next, logp, x0_hat, mean = interpret(sde_step, *everything)
    expected, _, expected_x0, expected_mean = REFERENCES["sde_step"](*everything)
    assert torch.equal(x_next, expected)
    assert torch.equal(x0_hat, expected_x0)
    assert torch.equal(mean, expected_mean)
    x, v, coef, *_, v_uncond, guidance, _ = arguments
    latents = (x, v, x_next, coef, v_uncond, guidance)
    exact, _ = REFERENCES["sde_logprob"](*double(*latents, True, False))
    n = coef[:, 2]
    assert ((logp - exact).abs() <= logp_error(*residual_error(*latents), n)).all()
    assert logp[NOISE_FREE[0]] == 0
    assert logp.dtype == mean.dtype == F32


@pytest.mark.parametrize("row_elements", SIZES)
def test_step_in_every_size(row_elements: int) -> None:
    _check_step(_step_arguments(row_elements, (F32, BF16), guided=True, given=False))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("guided", "given"), list(product([False, True], repeat=2)))
def test_step_in_every_dtype_and_form(
    dtypes: tuple[torch.dtype, torch.dtype], guided: bool, given: bool
) -> None:
    _check_step(_step_arguments(70, dtypes, guided=guided, given=given))


@pytest.mark.parametrize("row_elements", [56, 2500])
@pytest.mark.parametrize("with_x0", [False, True])
def test_every_form_of_the_step_has_the_same_bits(row_elements: int, with_x0: bool) -> None:
    arguments = _step_arguments(row_elements, (F32, BF16), guided=True, given=False)
    everything: tuple[Any, ...] = (*arguments, True, True)
    x_next, logp, x0_hat, mean = interpret(sde_step, *everything)
    less, logp_less, x0_less, mean_less = interpret(sde_step, *arguments, with_x0, False)
    x = arguments[0].clone()
    logp_in_place, x0_in_place = interpret(sde_step_, x, *arguments[1:], with_x0)
    assert torch.equal(x_next, less)
    assert torch.equal(x_next, x)
    assert torch.equal(logp, logp_less)
    assert torch.equal(logp, logp_in_place)
    for clean in (x0_less, x0_in_place):
        assert torch.equal(clean, x0_hat) if with_x0 else clean.shape == (0,)
    assert mean_less.shape == (0,)
    assert torch.equal(mean, REFERENCES["sde_step"](*everything)[3])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x, coef, zeros = torch.empty(shape), coefficients(shape[0]), torch.zeros(shape[0])
    ids = torch.arange(shape[0])
    operands = (x, x, coef, 0, ids, 0, ids, None, 1.0, None)
    x_next, logp, x0_hat, mean = interpret(sde_step, *operands, True, True)
    assert x_next.shape == x0_hat.shape == mean.shape == shape
    assert torch.equal(logp, zeros)
    assert torch.equal(interpret(sde_step_, *operands, False)[0], zeros)
    logp, mean = interpret(sde_logprob, x, x, x, coef, None, 1.0, True, True)
    assert torch.equal(logp, zeros)
    assert mean.shape == shape
    assert tweedie(x, x, logp, 0.0).shape == shape
    tweedie_(x, x.clone(), None, 0.5)
    needs = (True, True, True, False)
    grads = sde_logprob_backward(logp, x, x, x, x, coef, None, 1.0, True, *needs)
    assert [g.shape for g in grads] == [shape, shape, shape, (0,)]


def test_shape_is_kept_and_rows_may_be_strided() -> None:
    x = rows(4, 24).reshape(4, 2, 3, 4).transpose(1, 3)
    noise = rows(4, 24, seed=1).reshape(4, 4, 3, 2)
    coef = coefficients(8)[::2]
    rest = (0, None, 0, None, None, 1.0, noise)
    x_next, logp, *_ = interpret(sde_step, x, x, coef, *rest, False, False)
    dense = (x.contiguous(), x.contiguous(), coef.contiguous())
    expected, logp_expected, *_ = interpret(sde_step, *dense, *rest, False, False)
    assert x_next.shape == x.shape
    assert x_next.is_contiguous()
    assert torch.equal(x_next, expected)
    assert torch.equal(logp, logp_expected)
    written = x.clone(memory_format=torch.preserve_format)
    assert not written.is_contiguous()
    interpret(sde_step_, written, x, coef, *rest, False)
    assert torch.equal(written, expected)


def test_one_row_of_coefficients_serves_all() -> None:
    latents = _density_arguments(56, (F32, BF16), guided=False)
    one = coefficients(4)[2].expand(BATCH, 4)
    every = (*latents[:3], one.contiguous(), *latents[4:])
    shared = (*latents[:3], one, *latents[4:])
    assert torch.equal(
        interpret(sde_logprob, *shared, True, False)[0],
        interpret(sde_logprob, *every, True, False)[0],
    )
    needs = (True, True, True, False)
    for grad in (torch.tensor(0.3).expand(BATCH), torch.arange(2.0 * BATCH)[::2]):
        got = interpret(sde_logprob_backward, grad, None, *shared, True, *needs)
        dense = interpret(sde_logprob_backward, grad.contiguous(), None, *every, True, *needs)
        for g, d in zip(got, dense, strict=True):
            assert torch.equal(g, d)


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
    arguments: tuple[Any, ...] = (*latents, mean_reduction, True)
    logp, mean = interpret(sde_logprob, *arguments)
    exact, _ = REFERENCES["sde_logprob"](*double(*arguments))
    assert torch.equal(mean, REFERENCES["sde_logprob"](*arguments)[1])
    bound = logp_error(*residual_error(*latents), latents[3][:, 2])
    scale = 1 if mean_reduction else row_elements
    assert ((logp - exact).abs() <= scale * bound + EPS * exact.abs()).all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize(("row_elements", "mean_reduction"), [(1, True), (56, False), (1025, True)])
def test_logprob_backward_against_float64(
    row_elements: int,
    mean_reduction: bool,
    with_mean: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    guided: bool,
) -> None:
    latents = _density_arguments(row_elements, dtypes, guided=guided)
    x, v, x_next, coef, v_uncond, guidance = latents
    grads = (torch.linspace(-1, 2, BATCH), rows(BATCH, row_elements) if with_mean else None)
    grad = grads[0]
    options = (mean_reduction, True, True, True, guided)
    got = interpret(sde_logprob_backward, *grads, *latents, *options)
    exact = REFERENCES["sde_logprob_backward"](*double(*grads, *latents, *options))
    _, bound = residual_error(*latents)
    divisor = row_elements if mean_reduction else 1
    noisy = coef[:, 2] > 0
    scale = torch.where(noisy, grad / coef[:, 2].square() / divisor, 0.0).abs().double()
    factors = (1.0, coef[:, 1].abs().max() * max(1.0, guidance), 1.0, coef[:, 1].abs().max())
    # Where the mean's gradient nearly cancels the density's, the rounding of either remains.
    share = 0.0 if grads[1] is None else 4 * EPS * grads[1].double().abs()
    for tensor, g, e, factor in zip((x, v, x_next, v_uncond), got, exact, factors, strict=True):
        if tensor is None:
            assert g.numel() == 0
            continue
        assert g.dtype == tensor.dtype
        rounding = torch.finfo(tensor.dtype).eps / 2 + 8 * EPS
        tiny = torch.finfo(tensor.dtype).tiny
        error = float(factor) * (scale[:, None] * bound * 2 + share) + rounding * e.abs() + tiny
        assert ((g.double() - e).abs() <= error).all()
        if tensor is x_next or not with_mean:
            assert torch.equal(g[NOISE_FREE[0]], torch.zeros_like(g[0]))


@pytest.mark.parametrize("needs", list(product([False, True], repeat=4)))
def test_only_wanted_gradients_are_written(needs: tuple[bool, bool, bool, bool]) -> None:
    latents = _density_arguments(70, (F32, BF16), guided=True)
    grads = (torch.ones(BATCH), latents[0])
    everything = interpret(sde_logprob_backward, *grads, *latents, True, *(True,) * 4)
    some = interpret(sde_logprob_backward, *grads, *latents, True, *needs)
    for wanted, full, part in zip(needs, everything, some, strict=True):
        assert torch.equal(part, full) if wanted else part.numel() == 0


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_tweedie(row_elements: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, v = (rows(BATCH, row_elements, dtype, seed=i) for i, dtype in enumerate(dtypes))
    for t in (torch.linspace(0, 1, BATCH), coefficients(BATCH)[:, 3], None):
        assert torch.equal(interpret(tweedie, x, v, t, 0.3), REFERENCES["tweedie"](x, v, t, 0.3))
        got, want = v.clone(), v.clone()
        interpret(tweedie_, x, got, t, 0.3)
        REFERENCES["tweedie_"](x, want, t, 0.3)
        assert torch.equal(got, want)


def test_tweedie_over_strided_velocities() -> None:
    x, v = rows(4, 24).reshape(4, 6, 4), rows(4, 24, seed=1).reshape(4, 4, 6).transpose(1, 2)
    want = REFERENCES["tweedie"](x, v, None, 0.3)
    interpret(tweedie_, x, v, None, 0.3)
    assert torch.equal(v, want)


@pytest.mark.parametrize("row_elements", [56, 2500])
def test_bits_of_a_row_ignore_the_batch(row_elements: int) -> None:
    latents = _density_arguments(row_elements, (F32, BF16), guided=True)
    whole, _ = interpret(sde_logprob, *latents, True, False)
    for row in range(BATCH):
        part = [a[row : row + 1] if isinstance(a, Tensor) else a for a in latents]
        assert torch.equal(interpret(sde_logprob, *part, True, False)[0][0], whole[row])


def test_noise_free_step_is_the_mean() -> None:
    x, v = rows(3, 56), rows(3, 56, seed=1)
    coef = coefficients(3, noise_free=(0, 1, 2))
    operands = (x, v, coef, 0, torch.arange(3), 5, None, None, 1.0, None)
    x_next, logp, _, mean = interpret(sde_step, *operands, False, True)
    assert torch.equal(x_next, coef[:, 0:1] * x + coef[:, 1:2] * v)
    assert torch.equal(x_next, mean)
    assert torch.equal(logp, torch.zeros(3))


def test_density_of_the_mean_is_its_maximum() -> None:
    """Known answer: at the mean the log-density is -ln n - ln(2 pi) / 2."""
    x, coef = torch.zeros(4, 56), coefficients(4)
    logp, _ = interpret(sde_logprob, x, x, x, coef, None, 1.0, True, False)
    known = -coef[:, 2].double().log() - math.log(2 * math.pi) / 2
    assert ((logp - known).abs() <= 8 * EPS).all()
