"""The in-place forms: the same numbers, no new storage, and never a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops.gain_advantages import NORMALIZATIONS, Normalization
from tests.support.ops import budget
from tests.support.ops.cases import DTYPES, F32, F64, SHAPES, poisoned, reference, rows, same_bits

IDS: dict[str, Any] = {"seed": 2**35, "step_ids": 3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_step_over_its_state(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)
    guided = {"v_uncond": r.v_uncond, "guidance": 3.0, "sample_ids": r.sample_ids, **IDS}
    expected = ops.sde_step_x0(r.x, r.v, r.coef, **guided)
    x, other = r.x.clone(), r.x.clone()
    with poisoned():
        x_next, logp = ops.sde_step_(x, r.v, r.coef, **guided)
        three = ops.sde_step_x0_(other, r.v, r.coef, **guided)
    assert x_next is x
    assert three[0] is other
    assert all(same_bits(a, b) for a, b in zip((x, logp), expected, strict=False))
    assert all(same_bits(a, b) for a, b in zip(three, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_tweedie_over_the_velocity(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)
    v = r.v.clone()
    assert ops.tweedie_(r.x, v, 0.3) is v
    (eager,) = reference("tweedie_")(r.x, r.v, None, 0.3)
    (exact,) = reference("tweedie_")(r.x.double(), r.v.double(), None, 0.3)
    budget.check(v, eager, exact, "x0_hat")
    if x_dtype == v_dtype:
        assert same_bits(v, ops.tweedie(r.x, r.v, 0.3))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(2, 3, 6), (1, 1, 2), (5, 24, 11), (1, 7, 300), (0, 2, 3)])
def test_advantages_over_rewards(
    normalize: Normalization, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rewards = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.rand(*shape[:2], shape[2] - 1, generator=torch.Generator().manual_seed(2)) > 0.2
    options: dict[str, Any] = {"normalize": normalize, "mask": mask, "clamp": 1.0}
    expected = ops.gain_advantages(rewards, **options)
    written = rewards.clone()
    got = ops.gain_advantages_(written, **options)
    assert same_bits(got, expected.to(dtype))
    assert got.data_ptr() == written.data_ptr()
    assert torch.equal(written[:, :, -1], rewards[:, :, -1])


STRIDED: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    lambda t: torch.stack((t, t), dim=1)[:, 1],
    lambda t: torch.stack((t, t), dim=-1)[..., 0],
]


@pytest.mark.parametrize("strided", STRIDED)
def test_non_contiguous_targets(strided: Callable[[Tensor], Tensor]) -> None:
    r = rows(3, (5, 70))
    x, v, rewards = strided(r.x), strided(r.v), strided(r.rewards)
    expected = ops.sde_step(r.x, r.v, r.coef, sample_ids=r.sample_ids, **IDS)
    ops.sde_step_(x, v, r.coef, sample_ids=r.sample_ids, **IDS)
    assert same_bits(x, expected[0])
    ops.tweedie_(r.x, v, 0.25)
    assert same_bits(v, ops.tweedie(r.x, r.v, 0.25))
    assert same_bits(ops.gain_advantages_(rewards), ops.gain_advantages(r.rewards))


def _in_place(x: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    r = rows(3, (4,))
    return {
        "sde_step_": lambda: ops.sde_step_(x, v, r.coef, sample_ids=r.sample_ids, **IDS),
        "tweedie_": lambda: ops.tweedie_(x, v, 0.5),
        "gain_advantages_": lambda: ops.gain_advantages_(x.unsqueeze(0)),
    }


@pytest.mark.parametrize("name", _in_place(torch.ones(3, 4), torch.ones(3, 4)))
def test_a_gradient_is_an_error(name: str) -> None:
    x, v = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=rf"sfgrpo::{name}: \w+ requires grad.*use {name[:-1]}"):
        _in_place(x, v)[name]()
    with torch.no_grad():
        _in_place(x, v)[name]()


@pytest.mark.parametrize("name", _in_place(torch.ones(3, 4), torch.ones(3, 4)))
def test_a_graph_that_saved_the_old_value_refuses_to_run(name: str) -> None:
    leaf = torch.ones(3, 4, requires_grad=True)
    saved = leaf.exp()  # exp's backward needs its own result
    with torch.no_grad():
        target = saved.detach()
        _in_place(target, target if name == "tweedie_" else torch.ones(3, 4))[name]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_expanded_targets_are_refused() -> None:
    r = rows(3, (4,))
    with pytest.raises(ValueError, match="v: got an expanded tensor, expected one with its own"):
        ops.tweedie_(r.x, torch.ones(1, 4).expand(3, 4), 0.5)


R = rows(3, (700,))


def _loss(v: Tensor, v_uncond: Tensor, *, reuse: bool) -> Tensor:
    return ops.policy_loss(
        R.x, v, R.x_next, R.coef, R.logp_old, R.advantages, v_uncond=v_uncond, guidance=2.0,
        v_ref=R.v_ref, clip_range=10.0, kl_weight=0.1, reuse_v=reuse,
    ).loss  # fmt: skip


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_gradient_over_the_velocities(backend: str | None) -> None:
    def gradients(reuse: bool) -> tuple[Tensor, ...]:
        leaves = [R.v.clone().requires_grad_(), R.v_uncond.clone().requires_grad_()]

        def run(v: Tensor, v_uncond: Tensor) -> Tensor:
            return _loss(2 * v, 3 * v_uncond, reuse=reuse)

        if backend:
            run = torch.compile(run, fullgraph=True, backend=backend)
        return torch.autograd.grad(run(*leaves), leaves)

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_reused_velocities_hold_the_gradient() -> None:
    v, v_uncond = R.v.clone().requires_grad_() * 1, R.v_uncond.clone().requires_grad_() * 1
    expected = torch.autograd.grad(_loss(v, v_uncond, reuse=False), (v, v_uncond))
    got = torch.autograd.grad(_loss(v, v_uncond, reuse=True), (v, v_uncond))
    assert [g.data_ptr() for g in got] == [v.data_ptr(), v_uncond.data_ptr()]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("v_ref", [None, R.v_ref])
def test_the_old_velocity_may_be_the_one_that_is_reused(v_ref: Tensor | None) -> None:
    def gradient(reuse: bool) -> Tensor:
        leaf = R.v.clone().requires_grad_()
        v = leaf * 1
        loss = ops.policy_loss(
            R.x, v, R.x_next, R.coef, R.logp_old, R.advantages, v_ref=v_ref,
            kl_weight=0.0 if v_ref is None else 0.1, ratio="guard", v_old=v.detach(), reuse_v=reuse,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_reusing_what_another_backward_needs_is_an_error() -> None:
    leaf = R.v.clone().requires_grad_()
    loss = _loss(leaf.exp(), R.v_uncond, reuse=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_over_reused_velocities_is_an_error() -> None:
    leaf = R.v.clone().requires_grad_()
    loss = _loss(2 * leaf, R.v_uncond, reuse=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _everything_in_place(x: Tensor, v: Tensor, coef: Tensor, ids: Tensor, step: int) -> Any:
    state, velocity = x * 1.0, v * 1.0
    _, logp = ops.sde_step_(state, velocity, coef, seed=1, sample_ids=ids, step_ids=step)
    clean = ops.tweedie_(state, velocity, 0.5)
    rewards = torch.stack((state, clean), 1).unsqueeze(0).flatten(2)
    return state, logp, clean, ops.gain_advantages_(rewards)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    r = rows(3, (6,))
    torch._dynamo.reset()
    compiled = torch.compile(_everything_in_place, fullgraph=True, backend=backend)
    for step in range(4):
        arguments = (r.x, r.v, r.coef, r.sample_ids, step)
        for one, other in zip(compiled(*arguments), _everything_in_place(*arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_compiled_mutation_of_an_argument_is_seen_outside() -> None:
    r = rows(3, (6,))

    def run(x: Tensor, v: Tensor) -> Tensor:
        ops.sde_step_(x, v, r.coef, sample_ids=r.sample_ids, **IDS)
        return x * 2

    one, other = r.x.clone(), r.x.clone()
    result = torch.compile(run, fullgraph=True)(one, r.v)
    torch.testing.assert_close(result, run(other, r.v))
    assert torch.equal(one, other)
    assert not torch.equal(one, r.x)
