"""What surrounds the ops in real code: torch.func, autocast, memory formats, sizes that move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import grad, vmap

from sfgrpo import ops
from tests.support.ops.cases import BF16, F32, F64, rows, same_bits

V, B = 3, 4


def _loop(function: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    return torch.stack([function(*(one[i] for one in stacked)) for i in range(V)])


def _guard(v: Tensor, x: Tensor) -> Tensor:
    return ops.policy_loss(
        x, v, R.x_next, R.coef, R.logp_old, R.advantages, v_ref=R.v_ref, kl_weight=0.1,
        clip_range=1.0, ratio="guard", v_old=R.v_old,
    ).loss  # fmt: skip


def _own(v: Tensor, x: Tensor) -> Tensor:
    return ops.policy_loss(x, v, R.x_next, R.coef, None, R.advantages).loss


R = rows(B, (2, 5))
STATES = torch.stack([rows(B, (2, 5), seed=s).x for s in range(V)])
MAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "sde_step": lambda x: ops.sde_step(
        x, R.v, R.coef, seed=4, sample_ids=R.sample_ids, step_ids=2, v_uncond=R.v_uncond
    )[0],
    "sde_step, log-density": lambda x: ops.sde_step(x, R.v, R.coef, noise=R.noise)[1],
    "sde_step_x0": lambda x: ops.sde_step_x0(x, R.v, R.coef, noise=R.noise)[2],
    "sde_logprob": lambda x: ops.sde_logprob(x, R.v, R.x_next, R.coef),
    "sde_logprob, mean": lambda x: ops.sde_logprob(x, R.v, R.x_next, R.coef, return_mean=True)[1],
    "tweedie": lambda x: ops.tweedie(x, R.v, 0.3),
    "gain_advantages": lambda x: ops.gain_advantages(x),
    "policy_loss": lambda x: (
        ops.policy_loss(
            x, R.v, R.x_next, R.coef, R.logp_old, R.advantages, v_ref=R.v_ref, kl_weight=0.1
        ).loss
    ),
    "policy_loss, guard": lambda x: _guard(R.v, x),
    "policy_loss, own density": lambda x: _own(R.v, x),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_a_loop(name: str) -> None:
    assert same_bits(vmap(MAPPED[name])(STATES), _loop(MAPPED[name], STATES))


OVERWRITING: dict[str, Callable[[Tensor], Any]] = {
    "sde_step": lambda x: ops.sde_step_(x, R.v, R.coef, noise=R.noise),
    "tweedie": lambda x: ops.tweedie_(R.x, x, 0.3),
    "gain_advantages": lambda x: ops.gain_advantages_(x),
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_vmap_of_an_op_in_place_names_the_other(name: str) -> None:
    told = f"sfgrpo::{name}_: got a batch of torch.vmap, .*; use {name}$"
    with pytest.raises(RuntimeError, match=told):
        vmap(OVERWRITING[name])(STATES.clone())


def test_vmap_over_another_dimension_and_over_ids() -> None:
    ids = torch.arange(V * B).reshape(V, B)

    def normals(samples: Tensor) -> Tensor:
        return ops.philox_normal((7,), seed=1, sample_ids=samples, step_ids=2)

    assert same_bits(vmap(normals, in_dims=1)(ids.T), _loop(normals, ids))


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sde_logprob": lambda v, x: ops.sde_logprob(x, v, R.x_next, R.coef).sum(),
    "tweedie": lambda v, x: ops.tweedie(x, v, R.coef[:, 3]).square().sum(),
    "policy_loss": lambda v, x: (
        ops.policy_loss(
            x, v, R.x_next, R.coef, R.logp_old, R.advantages, v_ref=R.v_ref, kl_weight=0.1
        ).loss
    ),
    "policy_loss, guard": lambda v, x: _guard(v, x),
    "policy_loss, own density": lambda v, x: _own(v, x),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_functional_gradients(name: str) -> None:
    """grad, and per-sample gradients by vmap(grad), equal autograd's."""
    function = GRADIENTS[name]

    def plain(x: Tensor) -> Tensor:
        v = R.v.clone().requires_grad_()
        return torch.autograd.grad(function(v, x), v)[0]

    torch.testing.assert_close(grad(function)(R.v, STATES[0]), plain(STATES[0]))
    each = vmap(grad(function), in_dims=(None, 0))(R.v, STATES)
    torch.testing.assert_close(each, _loop(plain, STATES))


@pytest.mark.parametrize("name", sorted(GRADIENTS.keys() - {"tweedie"}))
@pytest.mark.parametrize("transformed", [False, True])
def test_a_second_derivative_is_an_error(name: str, transformed: bool) -> None:
    """Never the 0 of a gradient that was taken for a constant."""

    def slope(v: Tensor) -> Tensor:
        if transformed:
            return grad(GRADIENTS[name])(v, STATES[0])
        return torch.autograd.grad(GRADIENTS[name](v, STATES[0]), v, create_graph=True)[0]

    def second(v: Tensor) -> Tensor:
        if transformed:
            return grad(lambda v: slope(v).square().sum())(v)
        return torch.autograd.grad(slope(v).square().sum() + v.sum(), v)[0]

    v = R.v.clone().requires_grad_(not transformed)
    assert bool(slope(v).any())
    with pytest.raises(RuntimeError, match=rf"ops.{name.split(',')[0]}: .* one differentiation"):
        second(v)


IN_PLACE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sde_step_": lambda v, x: ops.sde_step_(x, v, R.coef, noise=R.noise),
    "tweedie_": lambda v, x: ops.tweedie_(x, v, 0.3),
}


@pytest.mark.parametrize("name", [*GRADIENTS, *IN_PLACE])
def test_a_tangent_is_an_error(name: str) -> None:
    """Never a result that has none, nor an overwritten one that keeps it."""
    op = name.split(",")[0]
    with forward_ad.dual_level():
        v = forward_ad.make_dual(R.v.clone(), torch.ones_like(R.v))
        with pytest.raises(NotImplementedError, match=f"{op}: v carries a tangent"):
            (GRADIENTS | IN_PLACE)[name](v, STATES[0].clone())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """The ops take what they are given and compute in float32, whatever autocast would prefer."""
    r = rows(3, (50,), F32, dtype)

    def everything() -> tuple[Tensor, ...]:
        v = r.v.clone().requires_grad_()
        x_next, logp = ops.sde_step(r.x, v, r.coef, seed=1, sample_ids=r.sample_ids, step_ids=0)
        loss = ops.policy_loss(r.x, v, x_next, r.coef, logp, r.advantages).loss
        score = ops.sde_logprob(r.x, v, x_next, r.coef)
        (gradient,) = torch.autograd.grad(loss + score.sum(), v)
        return x_next, logp, loss.detach(), gradient, ops.tweedie(r.x, r.v, 0.5)

    expected = everything()
    with torch.autocast("cpu", dtype):
        got = everything()
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_channels_last() -> None:
    """Noise belongs to the element's place in the image, not to its place in memory."""
    r = rows(2, (3, 8, 8))
    x, v = (t.to(memory_format=torch.channels_last) for t in (r.x, r.v))
    assert not x.is_contiguous()
    ids = {"seed": 1, "sample_ids": r.sample_ids, "step_ids": 3}
    for one, other in zip(
        ops.sde_step_x0(x, v, r.coef, **ids), ops.sde_step_x0(r.x, r.v, r.coef, **ids), strict=True
    ):
        assert same_bits(one, other)
    leaf = v.detach().requires_grad_()
    ops.sde_logprob(x, leaf, r.x_next, r.coef).sum().backward()
    plain = r.v.clone().requires_grad_()
    ops.sde_logprob(r.x, plain, r.x_next, r.coef).sum().backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    assert torch.equal(leaf.grad, plain.grad)


def test_a_moving_step_and_batch_do_not_recompile_for_ever() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor, ids: Tensor, coef: Tensor, number: int) -> Tensor:
        return ops.sde_step(x, x, coef, seed=0, sample_ids=ids, step_ids=number)[0] + 1

    for number in range(6):
        batch = 2 + number
        r = rows(batch, (5,))
        step(r.x, r.sample_ids, r.coef, number)
    assert counter.frame_count <= 3  # step 0, then one that moves, and 1 aside


def _lazy_zeros(rows_: int, elements: int) -> Tensor:
    """bf16 zeros that take no memory until written: the kernel maps them to one page."""
    return torch.from_numpy(numpy.zeros((rows_, elements), dtype=numpy.int16)).view(BF16)


def test_compiles_with_numbers_that_move() -> None:
    """dynamic=True makes symbols of Python's numbers, as does a second call with another one."""

    def all_ops(v: Tensor, number: float) -> Tensor:
        logp = ops.sde_logprob(R.x, v, R.x_next, R.coef, v_uncond=R.v_uncond, guidance=number)
        loss = ops.policy_loss(R.x, v, R.x_next, R.coef, None, logp, clip_range=number).loss
        gains = ops.gain_advantages(v, clamp=number)
        return loss + ops.tweedie(R.x, v, number).sum() + gains.sum()

    for dynamic, numbers in ((True, (0.25,)), (None, (0.25, 0.5))):
        torch._dynamo.reset()
        compiled = torch.compile(all_ops, fullgraph=True, dynamic=dynamic, backend="eager")
        for number in numbers:
            torch.testing.assert_close(compiled(R.v, number), all_ops(R.v, number))


def test_more_than_2_to_the_31_elements() -> None:
    """The last element, beyond 32-bit addresses, is read, and by the right row."""
    elements = 2**30 + 5
    x, x_next = _lazy_zeros(2, elements), _lazy_zeros(2, elements)
    assert x.numel() > 2**31
    coef = torch.tensor([[1.0, 0.0, 0.5, 0.5]]).repeat(2, 1)
    before = ops.sde_logprob(x, x, x_next, coef, reduction="sum")
    x_next[1, -1] = 2.0**20
    after = ops.sde_logprob(x, x, x_next, coef, reduction="sum")
    zeros = torch.zeros(2)
    stats = ops.policy_loss(x, x, x_next, coef, zeros, zeros).stats
    assert after[0] == before[0]
    expected = 2.0**40 / (2 * 0.5**2)
    assert float(before[1] - after[1]) == pytest.approx(expected, rel=1e-3)
    assert float((stats.logp[0] - stats.logp[1]) * elements) == pytest.approx(expected, rel=1e-3)


def test_float64_stays_float64() -> None:
    r = rows(3, (5,), F64, F64)
    assert ops.sde_logprob(r.x, r.v, r.x_next, r.coef).dtype == F64
    assert ops.tweedie_(r.x, r.v, 0.5).dtype == F64
