"""The loss: PPO written with PyTorch's distributions, the clip, the KL, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from tests.support.ops import budget
from tests.support.ops.cases import (
    DTYPES,
    F64,
    SHAPES,
    Rows,
    arguments,
    call,
    poisoned,
    reference,
    rows,
)

FORMS = ("density", "guard", "guard, re-centred")


def _ratio(form: str, r: Rows) -> dict[str, Any]:
    """The arguments that ask for a form of the ratio."""
    ratio, *recentred = form.split(", ")
    return {"ratio": ratio, "v_old": r.v_old if recentred else None}


def _textbook(r: Rows, v: Tensor, v_uncond: Tensor, clip: float, beta: float, form: str) -> Tensor:
    """Clipped PPO with the Gaussian KL, in float64, over the rows that have noise.

    The guard's ratio as Flow-GRPO's code has it, with the bias computed from the means.
    """
    keep = r.coef[:, 2] > 0
    a, b, n, _ = r.coef.reshape(-1, 4, *(1,) * (v.ndim - 1)).unbind(1)
    velocity = v_uncond + 2.0 * (v - v_uncond)
    policy = Normal((a * r.x + b * velocity)[keep], n[keep])
    anchor = Normal((a * r.x + b * r.v_ref)[keep], n[keep])
    logp = policy.log_prob(r.x_next[keep]).flatten(1).mean(1)
    log_ratio = logp - r.logp_old[keep]
    if form == "guard, re-centred":
        old = Normal((a * r.x + b * r.v_old)[keep], n[keep])
        bias = kl_divergence(policy, old).flatten(1).mean(1)
        log_ratio = logp - old.log_prob(r.x_next[keep]).flatten(1).mean(1) + bias
    ratio = (log_ratio if form == "density" else r.coef[keep, 2] * log_ratio).exp()
    advantages = r.advantages[keep]
    surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
    kl = kl_divergence(policy, anchor).flatten(1).mean(1)
    return (-surrogate + beta * kl).mean()


def _near_the_policy(r: Rows) -> Rows:
    """Old log-densities close enough that ratios stand on either side of the clip."""
    logp = ops.sde_logprob(r.x, r.v, r.x_next, r.coef, v_uncond=r.v_uncond, guidance=2.0)
    old = logp + 0.2 * torch.sin(7.0 * torch.arange(len(logp)) + 1).to(logp.dtype)
    return Rows(**{**vars(r), "logp_old": old})


@pytest.mark.parametrize("clip", [1e-4, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("form", FORMS)
def test_is_ppo_with_a_gaussian_kl(clip: float, beta: float, form: str) -> None:
    r = _near_the_policy(rows(9, (4, 9), F64, F64))
    leaves = (r.v.requires_grad_(), r.v_uncond.requires_grad_())
    result = ops.policy_loss(
        r.x, r.v, r.x_next, r.coef, r.logp_old, r.advantages, v_uncond=r.v_uncond, guidance=2.0,
        v_ref=r.v_ref, clip_range=clip, kl_weight=beta, **_ratio(form, r),
    )  # fmt: skip
    expected = _textbook(r, *leaves, clip, beta, form)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(result.loss, leaves)
    want = torch.autograd.grad(expected, leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def _call(
    r: Rows, v: Tensor, v_uncond: Tensor | None, fused: bool, form: str = "density"
) -> Tensor:
    guidance, v_ref = (1.0, None) if v_uncond is None else (2.0, r.v_ref)
    scale, weights = (None, None) if v_uncond is None else (r.kl_scale, r.weights)
    beta = 0.0 if v_ref is None else 0.5
    if fused:
        with poisoned():
            return ops.policy_loss(
                r.x, v, r.x_next, r.coef, r.logp_old, r.advantages, v_uncond=v_uncond,
                guidance=guidance, v_ref=v_ref, clip_range=(0.05, 0.1), kl_weight=beta,
                kl_scale=scale, weights=weights, **_ratio(form, r),
            ).loss  # fmt: skip
    return REFERENCES["policy_loss"](
        r.x, v, r.x_next, r.coef, r.logp_old, r.advantages, v_uncond, guidance, v_ref, 0.05, 0.1,
        beta, scale, weights, False, form != "density", _ratio(form, r)["v_old"],
    )[0]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_against_the_reference(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype, full: bool, form: str
) -> None:
    """The closed-form gradient against autograd of the specification."""
    r = _near_the_policy(rows(5, shape, x_dtype, v_dtype))
    wide = r.replace(lambda t: t.double() if t.is_floating_point() else t)

    def run(s: Rows, fused: bool) -> tuple[Tensor, ...]:
        leaves = [s.v.detach().clone().requires_grad_()]
        if full:
            leaves.append(s.v_uncond.detach().clone().requires_grad_())
        loss = _call(s, leaves[0], leaves[1] if full else None, fused, form)
        return loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)

    names = ("loss", "grad_v", "grad_v_uncond")
    results = zip(names, run(r, True), run(r, False), run(wide, False), strict=False)
    for name, got, eager, exact in results:
        budget.check(got, eager, exact, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("full", [False, True])
def test_gradcheck(form: str, full: bool) -> None:
    r = _near_the_policy(rows(5, (6,), F64, F64))
    leaves = (r.v.requires_grad_(), r.v_uncond.requires_grad_())[: 2 if full else 1]

    def loss(v: Tensor, v_uncond: Tensor | None = None) -> Tensor:
        return _call(r, v, v_uncond, True, form)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(
    ("advantage", "shift", "clipped"),
    [
        (1.0, 0.2, True),  # already much likelier, and good: nothing more to gain
        (1.0, -0.2, False),
        (-1.0, 0.2, False),
        (-1.0, -0.2, True),
        (1.0, 0.0, False),
        (0.0, 0.5, False),
    ],
)
def test_clip_cuts_the_gradient_on_one_side(advantage: float, shift: float, clipped: bool) -> None:
    r = rows(1, (40,), F64, F64)
    logp = ops.sde_logprob(r.x, r.v, r.x_next, r.coef)
    v = r.v.requires_grad_()
    loss, stats = ops.policy_loss(
        r.x, v, r.x_next, r.coef, logp - shift, torch.tensor([advantage], dtype=F64), clip_range=0.1
    )
    loss.backward()
    assert bool(stats.clipped) == clipped
    assert v.grad is not None
    assert bool((v.grad != 0).any()) == (not clipped and advantage != 0)
    ratio = float(torch.tensor(shift, dtype=F64).exp())
    assert float(stats.ratio) == pytest.approx(ratio, rel=1e-12)
    limited = min(max(ratio, 0.9), 1.1)
    assert float(loss.detach()) == pytest.approx(
        -min(advantage * ratio, advantage * limited), rel=1e-12
    )


def test_asymmetric_clip() -> None:
    r = rows(1, (40,), F64, F64)
    logp = ops.sde_logprob(r.x, r.v, r.x_next, r.coef)
    one = torch.ones(1, dtype=F64)
    for sign, expected in ((1.0, -1.3), (-1.0, 0.9)):
        stats = ops.policy_loss(
            r.x, r.v, r.x_next, r.coef, logp - sign, sign * one, clip_range=(0.1, 0.3)
        ).stats
        assert float(stats.surrogate) == pytest.approx(expected, rel=1e-12)


def test_noise_free_rows_take_no_part() -> None:
    r = rows(4, (30,))  # the last row has n = 0
    v = r.v.requires_grad_()
    extras = {"v_ref": r.v_ref, "kl_weight": 0.3, "clip_range": 0.5}
    whole = ops.policy_loss(r.x, v, r.x_next, r.coef, r.logp_old, r.advantages, **extras)
    part = ops.policy_loss(
        *(t[:3] for t in (r.x, v, r.x_next, r.coef, r.logp_old, r.advantages)),
        **{**extras, "v_ref": r.v_ref[:3]},
    )
    assert torch.equal(whole.loss, part.loss)
    assert [float(column[3]) for column in whole.stats] == [0.0, 1.0, 0.0, 0.0, 0.0]
    whole.loss.backward()
    assert v.grad is not None
    assert not v.grad[3].any()
    assert v.grad[:3].any()


def test_numbers_of_noise_free_rows_are_never_looked_at() -> None:
    r = rows(4, (30,))
    poison = torch.tensor([0.0, 0.0, 0.0, float("nan")])
    spoilt = {
        name: getattr(r, name) + poison
        for name in ("logp_old", "advantages", "kl_scale", "weights")
    }
    clean = arguments(r, full=True)["policy_loss"]
    other = arguments(Rows(**{**vars(r), **spoilt}), full=True)["policy_loss"]
    for function in (lambda *args: call("policy_loss", args), reference("policy_loss")):
        for one, two in zip(function(*clean), function(*other), strict=True):
            assert torch.equal(one, two)


def test_only_noise_free_rows_give_zero() -> None:
    r = rows(3, (5,))
    coef = r.coef * torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss, stats = ops.policy_loss(r.x, r.v, r.x_next, coef, r.logp_old, r.advantages)
    assert float(loss) == 0.0
    assert stats.ratio.tolist() == [1.0] * 3


def test_kl_is_reported_without_weight() -> None:
    r = rows(3, (50,), F64, F64)
    arguments = (r.x, r.v, r.x_next, r.coef, r.logp_old, r.advantages)
    without = ops.policy_loss(*arguments)
    weightless = ops.policy_loss(*arguments, v_ref=r.v_ref)
    assert float(without.loss) == float(weightless.loss)
    assert not without.stats.kl.any()
    _, b, n, _ = r.coef.unbind(1)
    expected = b.square() * (r.v - r.v_ref).square().mean(1) / (2 * n.square())
    torch.testing.assert_close(weightless.stats.kl[:2], expected[:2], rtol=1e-12, atol=0)
    scaled = ops.policy_loss(*arguments, v_ref=r.v_ref, kl_scale=r.kl_scale).stats.kl
    expected = r.kl_scale * (r.v - r.v_ref).square().mean(1)
    torch.testing.assert_close(scaled[:2], expected[:2], rtol=1e-12, atol=0)


def test_statistics_are_detached() -> None:
    r = rows(2, (8,))
    result = ops.policy_loss(r.x, r.v.requires_grad_(), r.x_next, r.coef, r.logp_old, r.advantages)
    assert result.loss.requires_grad
    assert not any(column.requires_grad for column in result.stats)


class _Calls(TorchDispatchMode):
    """The names of the ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", [ops.policy_loss, torch.ops.sfgrpo.policy_loss.default])
def test_backward_is_one_op(call: Callable[..., tuple[Tensor, ...]]) -> None:
    """Nothing is made for the statistics, which have no gradient."""
    r = rows(2, (8,))
    given = (r.x, r.v.requires_grad_(), *arguments(r, full=False)["policy_loss"][2:])
    loss = call(*given[: 6 if call is ops.policy_loss else None])[0]
    seed = torch.ones(())
    with _Calls() as calls:
        torch.autograd.grad(loss, r.v, seed)
    made = [name for name in calls.names if name != "aten::detach"]
    assert made == ["sfgrpo::policy_loss_backward"]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, v = torch.zeros(shape), torch.zeros(shape, requires_grad=True)
    coef = torch.tensor([[1.0, -0.1, 0.2, 0.5]]).repeat(shape[0], 1)
    zeros = torch.zeros(shape[0])
    loss, stats = ops.policy_loss(x, v, x, coef, zeros, zeros + 1)
    loss.backward()
    assert float(loss.detach()) == (-1.0 if shape[0] else 0.0)
    assert stats.logp.tolist() == [0.0] * shape[0]
    assert v.grad is not None
    assert v.grad.shape == shape


def test_the_default_weight_is_one_over_the_noisy_rows() -> None:
    r = rows(4, (30,), F64, F64)  # three of them
    given = arguments(r, full=False)["policy_loss"]
    weights = torch.full((4,), 1 / 3, dtype=F64)
    for function in (lambda *args: call("policy_loss", args), reference("policy_loss")):
        default, explicit = function(*given), function(*given[:-4], weights, *given[-3:])
        torch.testing.assert_close(default[0], explicit[0], rtol=1e-15, atol=0)
        torch.testing.assert_close(default[2], explicit[2], rtol=1e-15, atol=0)
