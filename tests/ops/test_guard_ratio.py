"""GRPO-Guard's ratio: what it is to the density's, and what the old velocity adds."""

from __future__ import annotations

from typing import get_args

import torch

from sfgrpo import ops
from sfgrpo.ops._policy_checks import Ratio
from tests.support.ops.cases import BF16, F64, rows


def test_the_guards_ratio_is_the_densities_to_the_power_of_n() -> None:
    r = rows(9, (4, 9), F64, F64)
    arguments = (r.x, r.v, r.x_next, r.coef, r.logp_old, r.advantages)
    guard = ops.policy_loss(*arguments, v_uncond=r.v_uncond, guidance=2.0, ratio="guard").stats
    density = ops.policy_loss(*arguments, v_uncond=r.v_uncond, guidance=2.0).stats
    torch.testing.assert_close(guard.ratio, density.ratio ** r.coef[:, 2], rtol=1e-14, atol=0)
    assert torch.equal(guard.logp, density.logp)
    assert guard.ratio[-1] == 1.0  # the row without noise


def test_the_guards_clip_is_on_its_own_ratio() -> None:
    """A log-ratio of .02 at n = .1 is .002 to the guard: clipped beyond that, not below."""
    r = rows(1, (40,), F64, F64)
    coef = r.coef.clone()
    coef[0, 2] = 0.1
    old, one = ops.sde_logprob(r.x, r.v, r.x_next, coef) - 0.02, torch.ones(1, dtype=F64)
    for clip, density, guard in ((0.001, True, True), (0.01, True, False), (0.1, False, False)):
        for ratio, clipped in zip(get_args(Ratio), (density, guard), strict=True):
            v = r.v.clone().requires_grad_()
            loss, stats = ops.policy_loss(
                r.x, v, r.x_next, coef, old, one, clip_range=clip, ratio=ratio
            )
            loss.backward()
            assert bool(stats.clipped) == clipped
            assert v.grad is not None
            assert bool(v.grad.any()) != clipped


def test_an_unmoved_policy_has_the_re_centred_ratio_1_whatever_logp_old_says() -> None:
    r = rows(9, (70,), BF16, BF16)
    stats = ops.policy_loss(
        r.x, r.v, r.x_next, r.coef, r.logp_old, r.advantages, ratio="guard", v_old=r.v
    ).stats
    assert stats.ratio.tolist() == [1.0] * 9


def test_re_centring_drops_what_grows_with_the_square_of_the_move() -> None:
    """The two forms of the guard's ratio differ by the bias alone."""
    r = rows(3, (70,), F64, F64)
    old = ops.sde_logprob(r.x, r.v_old, r.x_next, r.coef)
    arguments = (r.x, r.v, r.x_next, r.coef, old, r.advantages)
    scaled = ops.policy_loss(*arguments, ratio="guard").stats.ratio
    exact = ops.policy_loss(*arguments, ratio="guard", v_old=r.v_old).stats.ratio
    _, b, n, _ = r.coef[:2].unbind(1)
    bias = -b.square() * (r.v - r.v_old).square().mean(1)[:2] / (2 * n)
    torch.testing.assert_close((scaled / exact).log()[:2], bias, rtol=1e-9, atol=0)
