"""The log-density: PyTorch's own normal distribution, and gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from sfgrpo.ops.sde_logprob import Reduction
from tests.support.ops import budget
from tests.support.ops.cases import DTYPES, F64, SHAPES, Rows, poisoned, reference, rows, same_bits

NAMES = ("x", "v", "x_next", "v_uncond")


def _wide(r: Rows) -> Rows:
    return r.replace(lambda t: t.double() if t.is_floating_point() else t)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_density_of_a_normal(shape: tuple[int, ...], reduction: Reduction) -> None:
    r = rows(3, shape, F64, F64)
    got = ops.sde_logprob(
        r.x, r.v, r.x_next, r.coef, v_uncond=r.v_uncond, guidance=2.0, reduction=reduction
    )
    a, b, n, _ = r.coef.reshape(3, 4, *(1,) * len(shape)).unbind(1)
    mean = a * r.x + b * (r.v_uncond + 2.0 * (r.v - r.v_uncond))
    each = Normal(mean[:2], n[:2]).log_prob(r.x_next[:2]).flatten(1)
    expected = each.mean(1) if reduction == "mean" else each.sum(1)
    torch.testing.assert_close(got[:2], expected, rtol=1e-12, atol=1e-12)
    assert float(got[2]) == 0.0  # noise-free


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_against_the_reference(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype, full: bool
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)

    def arguments(s: Rows) -> tuple[object, ...]:
        guidance = (s.v_uncond, 3.0) if full else (None, 1.0)
        return s.x, s.v, s.x_next, s.coef, *guidance, full, False

    with poisoned():
        got = ops.sde_logprob(
            r.x, r.v, r.x_next, r.coef, v_uncond=r.v_uncond if full else None,
            guidance=3.0 if full else 1.0, reduction="mean" if full else "sum",
        )  # fmt: skip
    eager, exact = (reference("sde_logprob")(*arguments(s))[0] for s in (r, _wide(r)))
    budget.check(got, eager, exact, "logp")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_gradients_against_autograd(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)

    def gradients(s: Rows, fused: bool) -> tuple[Tensor, ...]:
        leaves = [getattr(s, name).detach().clone().requires_grad_() for name in NAMES]
        x, v, x_next, v_uncond = leaves
        if fused:
            with poisoned():
                logp = ops.sde_logprob(x, v, x_next, s.coef, v_uncond=v_uncond, guidance=3.0)
                return torch.autograd.grad(logp, leaves, s.grad)
        logp, _ = REFERENCES["sde_logprob"](x, v, x_next, s.coef, v_uncond, 3.0, True, False)
        return torch.autograd.grad(logp, leaves, s.grad)

    got, eager, exact = gradients(r, True), gradients(r, False), gradients(_wide(r), False)
    for name, one, plain, wide in zip(NAMES, got, eager, exact, strict=True):
        budget.check(one, plain, wide, f"gradient of {name}")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction: Reduction) -> None:
    r = rows(3, (7,), F64, F64)
    leaves = [getattr(r, name).requires_grad_() for name in NAMES]

    def score(x: Tensor, v: Tensor, x_next: Tensor, v_uncond: Tensor) -> Tensor:
        return ops.sde_logprob(
            x, v, x_next, r.coef, v_uncond=v_uncond, guidance=2.5, reduction=reduction
        )

    assert torch.autograd.gradcheck(score, leaves)


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_needed_gradients(wanted: int) -> None:
    r = rows(2, (9,))
    leaves = [getattr(r, name).requires_grad_(i == wanted) for i, name in enumerate(NAMES)]
    x, v, x_next, v_uncond = leaves
    ops.sde_logprob(x, v, x_next, r.coef, v_uncond=v_uncond, guidance=2.0).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]


def test_gradient_of_an_expanded_sum() -> None:
    """``sum().backward()`` hands over a gradient of stride 0."""
    r = rows(3, (33,))
    one, other = (r.v.clone().requires_grad_() for _ in range(2))
    ops.sde_logprob(r.x, one, r.x_next, r.coef).sum().backward()
    ops.sde_logprob(r.x, other, r.x_next, r.coef).backward(torch.ones(3))
    assert one.grad is not None
    assert other.grad is not None
    assert torch.equal(one.grad, other.grad)


def test_the_mean_and_its_gradient_come_along() -> None:
    """KL terms of published code start at the mean: value and both gradients in one pass each."""
    r = rows(3, (7,), F64, F64)
    leaves = [getattr(r, name).requires_grad_() for name in NAMES]
    x, v, x_next, v_uncond = leaves

    def both(*leaf: Tensor) -> tuple[Tensor, Tensor]:
        x, v, x_next, v_uncond = leaf
        return ops.sde_logprob(
            x, v, x_next, r.coef, v_uncond=v_uncond, guidance=2.5, return_mean=True
        )

    logp, mean = both(*leaves)
    a, b = r.coef[:, 0:1], r.coef[:, 1:2]
    torch.testing.assert_close(mean, a * x + b * (v_uncond + 2.5 * (v - v_uncond)))
    assert same_bits(logp, ops.sde_logprob(x, v, x_next, r.coef, v_uncond=v_uncond, guidance=2.5))
    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_the_mean_keeps_the_precision_of_the_arithmetic(
    x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    r = rows(3, (1025,), x_dtype, v_dtype)
    with poisoned():
        _, mean = ops.sde_logprob(r.x, r.v, r.x_next, r.coef, return_mean=True)
    eager, exact = (
        reference("sde_logprob")(s.x, s.v, s.x_next, s.coef, None, 1.0, True, True)[1]
        for s in (r, _wide(r))
    )
    assert mean.dtype == r.coef.dtype
    budget.check(mean, eager, exact, "mean")
