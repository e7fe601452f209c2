"""The step: exact where it must be, within rounding elsewhere, scored on what it stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from tests.support.ops import budget
from tests.support.ops.cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    SHAPES,
    Rows,
    call,
    poisoned,
    reference,
    rows,
    same_bits,
)

SEED = 2**40 + 3


def _arguments(r: Rows, *, guided: bool, given: bool) -> tuple[Any, ...]:
    """In the schema's order."""
    uncond, guidance = (r.v_uncond, 4.5) if guided else (None, 1.0)
    noise = r.noise if given else None
    ids = (SEED, r.sample_ids, 0, r.step_ids)
    return r.x, r.v, r.coef, *ids, uncond, guidance, noise, True, True


def _step(r: Rows, *, guided: bool, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    with poisoned():
        return ops.sde_step_x0(
            r.x, r.v, r.coef, seed=SEED, sample_ids=r.sample_ids, step_ids=r.step_ids,
            v_uncond=r.v_uncond if guided else None, guidance=4.5 if guided else 1.0,
            noise=r.noise if given else None,
        )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_against_the_reference(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype, guided: bool, given: bool
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)
    got = _step(r, guided=guided, given=given)
    eager = reference("sde_step")(*_arguments(r, guided=guided, given=given))
    wide = r.replace(lambda t: t.double() if t.is_floating_point() else t)
    exact = reference("sde_step")(*_arguments(wide, guided=guided, given=given))
    budget.check(got[0], eager[0], exact[0], "x_next")
    budget.check(got[2], eager[2], exact[2], "x0_hat")
    *_, mean = call("sde_step", _arguments(r, guided=guided, given=given))
    budget.check(mean, eager[3], exact[3], "mean")

    # The log-density belongs to the x_next that was stored, so each has its own exact value.
    uncond, guidance = (wide.v_uncond, 4.5) if guided else (None, 1.0)

    def exact_logp(x_next: Tensor) -> Tensor:
        arguments = (wide.x, wide.v, x_next.double(), wide.coef, uncond, guidance, True, False)
        return reference("sde_logprob")(*arguments)[0]

    allowed = 2 * budget.error(eager[1], exact_logp(eager[0]))
    # The mean is rounded in float32 before the difference to x_next is taken.
    n = r.coef[:-1, 2]
    scale = float(max(r.x.abs().max(), r.v.abs().max())) * (2 * guidance if guided else 1.0)
    allowed += 8 * float(torch.finfo(got[1].dtype).eps * (scale / n + n.log().abs() + 1).max())
    assert budget.error(got[1], exact_logp(got[0])) <= allowed


def test_hand_computed() -> None:
    x, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -8.0]])
    coef = torch.tensor([[0.5, 0.25, 2.0, 0.125]])
    x_next, logp, x0_hat = ops.sde_step_x0(x, v, coef, noise=torch.tensor([[1.0, -2.0]]))
    assert x_next.tolist() == [[3.5, -5.0]]
    assert x0_hat.tolist() == [[0.5, 3.0]]
    expected = -(1.0 + 4.0) / 2 / 2 - math.log(2.0) - 0.5 * math.log(2 * math.pi)
    assert float(logp) == pytest.approx(expected, rel=1e-6)


def test_guidance_by_hand() -> None:
    x, v, u = torch.zeros(1, 3), torch.full((1, 3), 2.0), torch.ones(1, 3)
    coef = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    x_next, _ = ops.sde_step(x, v, coef, v_uncond=u, guidance=3.0, noise=torch.ones(1, 3))
    assert x_next.tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_noise_free_rows(x_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    r = rows(2, (70,), x_dtype, v_dtype)  # the last row has n = 0
    x_next, logp, _ = _step(r, guided=False, given=False)
    a, b = r.coef[1, :2].to(x_dtype if x_dtype == torch.float64 else F32)
    assert same_bits(x_next[1], (a * r.x[1].to(a.dtype) + b * r.v[1].to(a.dtype)).to(x_dtype))
    assert float(logp[1]) == 0.0


def test_noise_is_that_of_philox_normal() -> None:
    r = rows(3, (5, 67))
    coef = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).repeat(3, 1)
    x_next, _ = ops.sde_step(
        r.x, r.v, coef, seed=SEED, sample_ids=r.sample_ids, step_ids=r.step_ids
    )
    expected = ops.philox_normal((5, 67), seed=SEED, sample_ids=r.sample_ids, step_ids=r.step_ids)
    assert same_bits(x_next + 0.0, expected + 0.0)  # -0 aside


@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_scored_as_it_was_sampled(x_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    """Rollout, scoring and training agree on the log-density, to the last bit."""
    r = rows(4, (3, 700), x_dtype, v_dtype)
    x_next, logp, _ = _step(r, guided=True, given=False)
    scored = ops.sde_logprob(r.x, r.v, x_next, r.coef, v_uncond=r.v_uncond, guidance=4.5)
    assert same_bits(scored, logp)
    loss = ops.policy_loss(
        r.x, r.v, x_next, r.coef, logp, r.advantages, v_uncond=r.v_uncond, guidance=4.5
    )
    assert same_bits(loss.stats.logp, logp)
    assert loss.stats.ratio.tolist() == [1.0] * 4


def test_two_outputs_equal_the_first_two_of_three() -> None:
    r = rows(3, (333,))
    ids = {"seed": 1, "sample_ids": r.sample_ids, "step_ids": 4}
    two, three = ops.sde_step(r.x, r.v, r.coef, **ids), ops.sde_step_x0(r.x, r.v, r.coef, **ids)
    assert all(same_bits(a, b) for a, b in zip(two, three, strict=False))
    assert same_bits(three[2], ops.tweedie(r.x, r.v, r.coef[:, 3].contiguous()))


def test_results_are_detached() -> None:
    r = rows(2, (8,))
    outputs = ops.sde_step_x0(r.x, r.v.requires_grad_(), r.coef, noise=r.noise)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (3, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    coef = torch.tensor([[1.0, -0.1, 0.2, 0.5]]).repeat(shape[0], 1)
    ids = torch.arange(shape[0])
    x_next, logp, x0_hat = ops.sde_step_x0(x, x, coef, seed=0, sample_ids=ids, step_ids=0)
    assert x_next.shape == x0_hat.shape == shape
    assert logp.tolist() == [0.0] * shape[0]


def _pass_through(v: Tensor, dtype: torch.dtype) -> Tensor:
    """``v`` as a step with b = 1 and nothing else stores it beside an ``x`` of ``dtype``."""
    coef = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    x = torch.zeros(1, v.numel(), dtype=dtype)
    return ops.sde_step(x, v.reshape(1, -1), coef, noise=torch.zeros_like(x))[0].reshape(-1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_reads_every_16_bit_number_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    torch.testing.assert_close(
        _pass_through(every, F32), every.float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounds_to_nearest_even_like_pytorch(dtype: torch.dtype) -> None:
    """All 16-bit numbers, the midpoints between them and their neighbours, beyond the range."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middles = (every[1:] + every[:-1]) / 2
    up, down = (torch.nextafter(middles, torch.tensor(sign * math.inf)) for sign in (1, -1))
    beyond = torch.tensor([65504.0, 65519.9, 65520.0, 1e5, 3.3e38, math.inf, math.nan])
    values = torch.cat((every, middles, up, down, beyond, -beyond))
    torch.testing.assert_close(
        _pass_through(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
    )
