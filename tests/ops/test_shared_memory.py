"""Ops in place whose operands overlap: refused where it would matter, right where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfgrpo import ops
from tests.support.ops.cases import BF16, F32, F64, rows, same_bits

R = rows(2, (700,))
Over = Callable[[Tensor, Tensor], object]
"""Run an op in place on (what it overwrites, what it only reads)."""


def _step(x: Tensor, v: Tensor, **options: Any) -> object:
    return ops.sde_step_(x, v, R.coef, **{"noise": R.noise, **options})


def _loss(v: Tensor, *, x: Tensor = R.x, **others: Any) -> Tensor:
    return ops.policy_loss(
        x, v, R.x_next, R.coef, R.logp_old, R.advantages, guidance=3.0, clip_range=10.0,
        kl_weight=0.1 if "v_ref" in others else 0.0, reuse_v=True, **others,
    ).loss  # fmt: skip


OVER: dict[str, Over] = {
    "sde_step_, v": _step,
    "sde_step_, v_uncond": lambda x, other: _step(x, R.v, v_uncond=other),
    "sde_step_, noise": lambda x, other: _step(x, R.v, noise=other),
    "sde_step_x0_, v": lambda x, other: ops.sde_step_x0_(x, other, R.coef, noise=R.noise),
    "tweedie_, x": lambda v, other: ops.tweedie_(other, v, 0.3),
    "policy_loss, v_uncond": lambda v, other: _loss(v, v_uncond=other),
    "policy_loss, x": lambda v, other: _loss(v, x=other),
    "policy_loss, v_ref": lambda v, other: _loss(v, v_ref=other),
    "policy_loss, v_old": lambda v, other: _loss(v, v_old=other, ratio="guard"),
}


def _pair(kind: str) -> tuple[Tensor, Tensor]:
    """Two ``[2, 700]`` out of one storage."""
    torch.manual_seed(0)
    if kind == "shifted":
        buffer = torch.randn(3000)
        return buffer[:1400].view(2, 700), buffer[699:2099].view(2, 700)
    if kind == "columns":
        both = torch.randn(2, 1400)
        return both[:, :700], both[:, 1:701]
    both = torch.randn(2, 1400)
    return both[:, :700], both[:, 700:]


@pytest.mark.parametrize("kind", ["shifted", "columns"])
@pytest.mark.parametrize("name", OVER)
def test_partial_overlap_is_refused(name: str, kind: str) -> None:
    target, other = _pair(kind)
    written = "x" if name.startswith("sde") else "v"
    operand = name.rpartition(" ")[2]
    with pytest.raises(ValueError, match=rf"^{written}: shares memory with {operand}, expected"):
        OVER[name](target, other)
    with pytest.raises(ValueError, match=rf"^{written}: shares memory with {operand}, expected"):
        OVER[name](other, target)


@pytest.mark.parametrize("name", OVER)
def test_views_that_interleave_are_as_good_as_copies(name: str) -> None:
    """Halves of the channels, as networks return them."""
    target, other = _pair("halves")
    expected, read = target.clone(), other.clone()
    OVER[name](expected, read)
    OVER[name](target, other)
    assert same_bits(target, expected)
    assert same_bits(other, read)


def test_advantages_over_rewards_that_overlap_are_refused() -> None:
    windows = torch.rand(2, 20).unfold(1, 6, 5)  # a state belongs to two trajectories
    with pytest.raises(ValueError, match="rewards: got an expanded tensor"):
        ops.gain_advantages_(windows)
    apart = torch.rand(2, 20).unfold(1, 6, 7)
    expected = ops.gain_advantages(apart)
    assert same_bits(ops.gain_advantages_(apart), expected)


def test_advantages_over_the_mask_are_refused() -> None:
    rewards = torch.zeros(1, 3, 6)
    mask = rewards.view(torch.bool).view(1, 3, 24)[:, :, :5]
    with pytest.raises(ValueError, match="rewards: shares memory with mask"):
        ops.gain_advantages_(rewards, mask=mask)


@pytest.mark.parametrize("name", ["sde_step_, v", "tweedie_, x", "policy_loss, x"])
@pytest.mark.parametrize("view", [torch.ops.aten._neg_view, lambda x: (x + 0j).conj().imag])
def test_negated_views_are_not_overwritten(name: str, view: Callable[[Tensor], Tensor]) -> None:
    negated = view(R.x.clone())
    assert negated.is_neg()
    with pytest.raises(ValueError, match=r"got a view of negated values.*resolve_neg\(\)"):
        OVER[name](negated, R.v.clone())


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_an_op_may_read_what_it_overwrites(dtype: torch.dtype) -> None:
    r = rows(2, (700,), dtype, dtype)
    both = r.x.clone()
    ops.tweedie_(both, both, 0.25)
    assert same_bits(both, ops.tweedie(r.x, r.x, 0.25))
    both = r.x.clone()
    got = ops.sde_step_x0_(both, both, r.coef, v_uncond=both, guidance=3.0, noise=both)
    options: dict[str, Any] = {"v_uncond": r.x, "guidance": 3.0, "noise": r.x}
    assert all(map(same_bits, got, ops.sde_step_x0(r.x, r.x, r.coef, **options)))


def _gradient(other: Callable[[Tensor], Tensor | None], *, reuse: bool, name: str) -> Tensor:
    leaf = R.v.clone().requires_grad_()
    v = leaf * 1
    options: dict[str, Any] = {"v_ref": R.v_ref, name: other(v)}
    result = ops.policy_loss(
        R.x, v, R.x_next, R.coef, R.logp_old, R.advantages, guidance=3.0, clip_range=10.0,
        kl_weight=0.1, reuse_v=reuse, **options,
    )  # fmt: skip
    return torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize("other", [lambda v: v, lambda v: v.detach(), lambda v: v.view(2, 700)])
def test_one_velocity_for_both_is_refused(other: Callable[[Tensor], Tensor]) -> None:
    _gradient(other, reuse=False, name="v_uncond")
    with pytest.raises(ValueError, match="v: shares memory with v_uncond, expected memory of its"):
        _gradient(other, reuse=True, name="v_uncond")


@pytest.mark.parametrize("other", [lambda v: v, lambda v: v.detach()])
def test_one_velocity_for_both_is_right_in_a_compiled_graph(
    other: Callable[[Tensor], Tensor],
) -> None:
    """There the memory is the compiler's, which would be told of two writes to one place."""

    def loss(v: Tensor) -> Tensor:
        w = v * 1
        return _loss(w, v_uncond=other(w), v_ref=R.v_ref)

    torch._dynamo.reset()
    leaf = R.v.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(got, _gradient(other, reuse=False, name="v_uncond"))


def test_a_compiled_graph_refuses_a_parameter() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="v: got a leaf that requires grad"):
        compiled(torch.nn.Parameter(R.v.clone()))


def test_the_velocity_may_be_its_own_reference() -> None:
    one, other = (_gradient(Tensor.detach, reuse=reuse, name="v_ref") for reuse in (True, False))
    assert same_bits(one, other)


@pytest.mark.parametrize("view", [lambda v: v, lambda v: v.view(2, 700), lambda v: v[:2]])
@pytest.mark.parametrize("name", ["v", "v_uncond"])
def test_a_parameter_keeps_its_values(name: str, view: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.nn.Parameter(R.v.clone())
    operands = {"v": R.v.clone(), "v_uncond": R.v_uncond.clone(), name: view(leaf)}
    with pytest.raises(ValueError, match=rf"^{name}: got a leaf that requires grad, expected the"):
        _loss(operands["v"], v_uncond=operands["v_uncond"])
    with torch.no_grad():  # nothing is to be written
        _loss(operands["v"], v_uncond=operands["v_uncond"])
    assert same_bits(leaf.detach(), R.v)


def test_an_expanded_velocity_is_refused() -> None:
    v = torch.randn(1, 700, requires_grad=True) * 1
    with pytest.raises(ValueError, match="v: got an expanded tensor, expected one with its own"):
        _loss(v.expand(2, 700))
    with pytest.raises(ValueError, match="v_uncond: got an expanded tensor, expected one with"):
        _loss(R.v.clone(), v_uncond=v.expand(2, 700))


def test_tensors_without_storage_are_left_alone() -> None:
    x, v = (torch.empty(2, 700, device="meta") for _ in range(2))
    coef, noise = torch.empty(2, 4, device="meta"), torch.empty(2, 700, device="meta")
    ops.sde_step_(x, v, coef, noise=noise)
    with FakeTensorMode():
        ops.tweedie_(torch.empty(2, 9), torch.empty(2, 9), 0.5)


def test_under_transforms_the_memory_is_that_of_the_tensors_wrapped() -> None:
    def twice(v: Tensor) -> Tensor:
        w = v * 1
        return _loss(w, v_uncond=w)

    with pytest.raises(ValueError, match="v: shares memory with v_uncond"):
        torch.func.grad(twice)(R.v)
