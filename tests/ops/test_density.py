"""The unnormalised log-density (Flow-CPS's) of the score and of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from tests.support.ops.cases import F32, F64, rows

R = rows(4, (3, 5))
D = 15


def _square(v: Tensor, r: Any = R, v_uncond: Tensor | None = None) -> Tensor:
    """``[B]``: -mean (x_next - a x - b v)^2; rows without noise 0."""
    a, b, n, _ = r.coef.reshape(4, 4, 1, 1).unbind(1)
    guided = v if v_uncond is None else v_uncond + 3.0 * (v - v_uncond)
    logp = -(r.x_next - a * r.x - b * guided).square().mean((1, 2))
    return torch.where(n.flatten() > 0, logp, 0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_score(reduction: Any) -> None:
    got = ops.sde_logprob(
        R.x, R.v, R.x_next, R.coef, reduction=reduction, density="unnormalised",
        v_uncond=R.v_uncond, guidance=3.0,
    )  # fmt: skip
    expected = _square(R.v, v_uncond=R.v_uncond) * (D if reduction == "sum" else 1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)
    assert float(got[-1]) == 0.0
    empty = ops.sde_logprob(R.x[:, :0], R.v[:, :0], R.x_next[:, :0], R.coef, density="unnormalised")
    assert empty.tolist() == [0.0] * 4


def test_float64_is_exact_and_the_default_dtype_does_not_matter() -> None:
    r = rows(4, (3, 5), F64, F64)
    got = ops.sde_logprob(r.x, r.v, r.x_next, r.coef, density="unnormalised")
    torch.testing.assert_close(got, _square(r.v, r), rtol=1e-14, atol=1e-14)
    usual = ops.sde_logprob(R.x, R.v, R.x_next, R.coef, density="unnormalised")
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = ops.sde_logprob(R.x, R.v, R.x_next, R.coef, density="unnormalised")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, usual)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_score(reduction: Any) -> None:
    r = rows(4, (3,), F64, F64)

    def score(x: Tensor, v: Tensor, x_next: Tensor, v_uncond: Tensor) -> Any:
        return ops.sde_logprob(
            x, v, x_next, r.coef, v_uncond=v_uncond, guidance=3.0, reduction=reduction,
            density="unnormalised", return_mean=True,
        )  # fmt: skip

    leaves = [t.clone().requires_grad_() for t in (r.x, r.v, r.x_next, r.v_uncond)]
    assert torch.autograd.gradcheck(score, leaves)


def _loss(v: Tensor, v_uncond: Tensor, r: Any = R, **options: Any) -> ops.PolicyLoss:
    settings: dict[str, Any] = {"clip_range": 0.2, "kl_weight": 0.1, "guidance": 3.0, **options}
    return ops.policy_loss(
        r.x, v, r.x_next, r.coef, -0.1 * r.logp_old.abs(), r.advantages, v_uncond=v_uncond,
        v_ref=r.v_ref, density="unnormalised", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
def test_loss(scaled: bool) -> None:
    kl_scale = R.kl_scale if scaled else None
    loss, stats = _loss(R.v, R.v_uncond, kl_scale=kl_scale)
    logp = _square(R.v, v_uncond=R.v_uncond)
    noisy = R.coef[:, 2] > 0
    ratio = torch.where(noisy, (logp + 0.1 * R.logp_old.abs()).exp(), 1.0)
    surrogate = -torch.minimum(R.advantages * ratio, R.advantages * ratio.clamp(0.8, 1.2))
    guided = R.v_uncond + 3.0 * (R.v - R.v_uncond)
    factor = R.kl_scale if scaled else R.coef[:, 1] ** 2 / (2 * R.coef[:, 2] ** 2)
    kl = torch.where(noisy, factor * (guided - R.v_ref).square().mean((1, 2)), 0.0)
    surrogate = torch.where(noisy, surrogate, 0.0)
    torch.testing.assert_close(stats.logp, logp, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(stats.ratio, ratio, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.kl, kl)
    torch.testing.assert_close(loss, (surrogate + 0.1 * kl).sum() / 3)


def test_gradients_of_the_loss() -> None:
    r = rows(4, (3,), F64, F64)
    leaves = [r.v.clone().requires_grad_(), r.v_uncond.clone().requires_grad_()]

    def loss(v: Tensor, v_uncond: Tensor) -> Tensor:
        return _loss(v, v_uncond, r, clip_range=10.0).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_policy_that_has_not_moved_has_ratio_1(dtype: torch.dtype) -> None:
    r = rows(64, (40,), dtype, dtype)
    old = ops.sde_logprob(r.x, r.v, r.x_next, r.coef, density="unnormalised")
    result = ops.policy_loss(r.x, r.v, r.x_next, r.coef, old, r.advantages, density="unnormalised")
    assert result.stats.ratio.tolist() == [1.0] * 64
    assert torch.equal(result.stats.logp, old)


def test_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(R.v, R.v_uncond), _loss(R.v, R.v_uncond))


def test_an_unknown_density_is_an_error() -> None:
    with pytest.raises(ValueError, match="density: got 'cps', expected 'gaussian' or 'unnorm"):
        ops.sde_logprob(R.x, R.v, R.x_next, R.coef, density="cps")  # pyright: ignore
