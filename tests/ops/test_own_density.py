"""The loss without an old log-density: the ratio to the very velocities that are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from tests.support.ops import budget
from tests.support.ops.cases import BF16, DTYPES, F32, F64, Rows, call, rows, same_bits
from tests.support.ops.triton_loss import (
    BATCH,
    NOISE_FREE,
    check_loss,
    loss_arguments,
    loss_kernel,
)
from tests.support.ops.triton_support import interpret

FORMS: dict[str, dict[str, Any]] = {
    "density": {},
    "guard": {"ratio": "guard"},
    "unnormalised": {"density": "unnormalised"},
}


def _loss(r: Rows, logp_old: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """The loss, its statistics and the gradients in v and v_uncond."""
    leaves = (r.v.clone().requires_grad_(), r.v_uncond.clone().requires_grad_())
    given: dict[str, Any] = {"guidance": 2.0, "v_ref": r.v_ref, "kl_weight": 0.1, "clip_range": 0.0}
    loss, stats = ops.policy_loss(
        r.x, leaves[0], r.x_next, r.coef, logp_old, r.advantages, v_uncond=leaves[1],
        **given, **options,
    )  # fmt: skip
    return loss.detach(), *stats, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_it_is_the_old_log_density_of_the_same_velocities(form: str, dtype: torch.dtype) -> None:
    """Bit for bit: of a policy that has not moved, hence at ratio 1, which no clip cuts."""
    r = rows(9, (70,), dtype, dtype)
    density = FORMS[form].get("density", "gaussian")
    own = ops.sde_logprob(
        r.x, r.v, r.x_next, r.coef, v_uncond=r.v_uncond, guidance=2.0, density=density
    )
    got = _loss(r, None, **FORMS[form])
    assert all(map(same_bits, got, _loss(r, own, **FORMS[form])))
    logp, ratio, clipped = got[1:4]
    assert same_bits(logp, own)
    assert ratio.tolist() == [1.0] * 9
    assert not clipped.any()
    assert all(gradient[:-1].any() for gradient in got[-2:])


@pytest.mark.parametrize("guard", [False, True])
def test_the_gradient_is_the_policy_gradient(guard: bool) -> None:
    """That of -mean(A log p), by PyTorch's distributions; the guard's ratio multiplies it by n."""
    r = rows(9, (6,), F64, F64)
    a, b, n, _ = r.coef[:-1].unsqueeze(2).unbind(1)
    v = r.v.clone().requires_grad_()
    loss, _ = ops.policy_loss(
        r.x, v, r.x_next, r.coef, None, r.advantages, ratio="guard" if guard else "density"
    )
    (got,) = torch.autograd.grad(loss, v)
    logp = Normal(a * r.x[:-1] + b * v[:-1], n).log_prob(r.x_next[:-1]).mean(1)
    credit = r.advantages[:-1] * (n[:, 0] if guard else 1.0)
    (want,) = torch.autograd.grad(-(credit * logp).mean(), v)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    # At ratio 1 the loss itself is -mean(A), wherever the velocities are.
    torch.testing.assert_close(loss.detach(), -r.advantages[:-1].mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
@pytest.mark.parametrize("guard", [False, True])
def test_cpp_against_autograd_of_the_reference(
    x_dtype: torch.dtype, v_dtype: torch.dtype, guard: bool
) -> None:
    r = rows(5, (1025,), x_dtype, v_dtype)
    wide = r.replace(lambda t: t.double() if t.is_floating_point() else t)

    def run(s: Rows, function: Any) -> tuple[Tensor, ...]:
        v = s.v.clone().requires_grad_()
        options = (0.0, 0.0, 0.1, None, None, False, guard, None)
        loss, stats, _ = function(
            s.x, v, s.x_next, s.coef, None, s.advantages, None, 1.0, s.v_ref, *options
        )
        assert stats[:, 1].tolist() == [1.0] * 5
        return loss.detach(), *torch.autograd.grad(loss, v)

    op, specification = torch.ops.sfgrpo.policy_loss, REFERENCES["policy_loss"]
    results = zip(run(r, op), run(r, specification), run(wide, specification), strict=True)
    for name, (got, eager, exact) in zip(("loss", "grad_v"), results, strict=True):
        budget.check(got, eager, exact, name)


def _arguments(r: Rows, v: Tensor) -> tuple[Any, ...]:
    """In the schema's order."""
    none = (None, 1.0, None, 0.1, 0.1, 0.0, None, None, False, False, None)
    return (r.x, v, r.x_next, r.coef, None, r.advantages, *none)


def test_opcheck() -> None:
    r = rows()
    torch.library.opcheck(
        torch.ops.sfgrpo.policy_loss.default, _arguments(r, r.v.clone().requires_grad_())
    )


def test_the_old_velocity_needs_no_old_log_density() -> None:
    r = rows(9, (70,))
    options = {"ratio": "guard", "v_old": r.v_old}
    got = _loss(r, None, **options)
    assert all(map(same_bits, got, _loss(r, r.logp_old, **options)))
    assert (got[2][:-1] != 1).all()


def test_nan_reaches_the_loss() -> None:
    r = rows(3, (5,))
    v = r.v.clone()
    v[0, 0] = float("nan")
    for function in (lambda *args: call("policy_loss", args), REFERENCES["policy_loss"]):
        loss, stats, back = function(*_arguments(r, v))
        assert loss.isnan()
        assert stats[0, 1].isnan()
        assert back[0, 0].isnan()
        assert not stats[1:].isnan().any()


@pytest.mark.parametrize("row_elements", [1, 56, 1025])
@pytest.mark.parametrize("guard", [False, True])
def test_triton(row_elements: int, guard: bool) -> None:
    arguments = list(loss_arguments(row_elements, guard=guard))
    arguments[4] = None
    _, stats, back = check_loss(tuple(arguments))
    assert stats[:, 1].tolist() == [1.0] * BATCH
    assert not stats[:, 2].any()
    noisy = [row for row in range(BATCH) if row not in NOISE_FREE]
    assert back[noisy, 0].all()
    arguments[1] = arguments[1].clone()
    arguments[1][0, 0] = float("nan")
    loss, stats, _ = interpret(loss_kernel, *arguments)
    assert loss.isnan()
    assert stats[0, 1].isnan()
