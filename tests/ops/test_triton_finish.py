"""One launch per op, finished by the last program; nothing makes the host wait."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfgrpo import ops
from sfgrpo.kernels import common, finish
from sfgrpo.kernels.common import LaunchParameters
from sfgrpo.kernels.finish import zeroed_counters
from sfgrpo.ops._backends import launcher
from tests.support.ops import cases
from tests.support.ops.triton_support import (
    NoTorchKernels,
    coefficients,
    interpret,
    launches,
    program_order,
    rows,
)

SHAPES = {"long": (2500,), "odd": (1025,), "short": (7, 8), "one": (1,)}
LOSS = "policy_loss_kernel"


@pytest.fixture(autouse=True)
def _own_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "_AT_REST", {})


def _counters_at_rest() -> list[Tensor]:
    return list(finish._AT_REST.values())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("op", cases.OPS)
def test_one_launch_and_none_by_pytorch(op: str, shape: tuple[int, ...], full: bool) -> None:
    arguments = cases.arguments(cases.rows(3, shape), full)[op]
    with launches() as seen, NoTorchKernels():
        launcher(op)(*arguments)
    assert len(seen) == 1
    assert all(not counters.any() for counters in _counters_at_rest())


@pytest.mark.parametrize(("batch", "row_elements"), [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("op", cases.OPS)
def test_at_most_one_launch_without_elements(op: str, batch: int, row_elements: int) -> None:
    r = cases.rows(batch, (row_elements,))
    if "advantages" in op:
        r = r.replace(lambda tensor: tensor[:0])
    arguments = cases.arguments(r, True)[op]
    with launches() as seen, NoTorchKernels():
        launcher(op)(*arguments)
    answers = {"sde_step_kernel", "sde_logprob_kernel"} if batch > 0 else set()
    assert set(seen) <= answers | {LOSS}
    assert len(seen) <= 1


@pytest.mark.parametrize("op", ["sde_step", "sde_logprob", "policy_loss"])
@pytest.mark.parametrize("shape", [(500,), (5,)])
def test_bits_do_not_depend_on_the_order_of_the_programs(op: str, shape: tuple[int, ...]) -> None:
    arguments = cases.arguments(cases.rows(6, shape), True)[op]
    with mock.patch.object(common, "LAUNCH", LaunchParameters(tile_elements=64)):
        want = interpret(launcher(op), *arguments)
        for order in (lambda i, n: n - 1 - i, lambda i, n: i * 7919 % n):
            with program_order(order):
                got = interpret(launcher(op), *arguments)
            assert all(map(cases.same_bits, got, want))


def test_counters_are_cleared_once_and_reused() -> None:
    x, coef = rows(4, 2500), coefficients(4)
    logprob = launcher("sde_logprob")
    first, _ = interpret(logprob, x, x, x, coef, None, 1.0, True, False)
    (counters,) = _counters_at_rest()
    with mock.patch.object(finish, "_persistent_zeros", side_effect=AssertionError):
        second, _ = interpret(logprob, x, x, x, coef, None, 1.0, True, False)
    assert cases.same_bits(first, second)
    assert _counters_at_rest()[0] is counters
    assert not counters.any()


def test_counters_grow_and_are_not_shared_while_in_use() -> None:
    x = torch.zeros(1)
    with zeroed_counters(x, 3) as few:
        with zeroed_counters(x, 3) as others:
            assert others.data_ptr() != few.data_ptr()
        assert few.numel() == finish.LEAST_COUNTERS
    with zeroed_counters(x, finish.LEAST_COUNTERS + 1) as many:
        assert many.numel() == 2 * finish.LEAST_COUNTERS
        assert many.dtype == torch.int32
    with zeroed_counters(x, 5) as kept:
        assert kept is many


def test_counters_of_a_failed_launch_are_dropped() -> None:
    x, coef = rows(2, 2500), coefficients(2)
    arguments = (x, x, x, coef, None, 1.0, True, False)
    want, _ = interpret(launcher("sde_logprob"), *arguments)

    def count_and_fail() -> None:
        with zeroed_counters(x, 2) as counters:
            counters[1] = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_and_fail()
    assert _counters_at_rest() == []
    assert cases.same_bits(interpret(launcher("sde_logprob"), *arguments)[0], want)


def test_a_graph_being_captured_gets_counters_of_its_own() -> None:
    """Without a GPU: the device's type and what it says of its stream are made up."""
    on_gpu = mock.Mock(device=mock.Mock(type="cuda"))
    module = mock.Mock(is_current_stream_capturing=mock.Mock(return_value=True))
    with (
        mock.patch.object(finish, "on_device_of", return_value=mock.MagicMock()),
        mock.patch.object(torch, "get_device_module", return_value=module),
        mock.patch.object(torch, "zeros", side_effect=lambda n, **_: torch.full((n,), 0)),
    ):
        fresh = []
        for _ in range(2):
            with zeroed_counters(on_gpu, 3) as counters:
                fresh.append(counters)
    assert fresh[0] is not fresh[1]
    assert [counters.tolist() for counters in fresh] == [[0, 0, 0]] * 2
    assert _counters_at_rest() == []


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("op", cases.OPS)
def test_launchers_never_look_at_data(op: str, full: bool) -> None:
    """On tensors without data: whatever needs a number of theirs on the host fails."""
    r = cases.rows(3, (2500,)).replace(lambda tensor: tensor.to("meta"))
    arguments = cases.arguments(r, full)[op]
    with launches(run=False) as seen, NoTorchKernels():
        launcher(op)(*arguments)
    assert len(seen) == 1


@pytest.mark.parametrize("gradients", [False, True])
def test_public_functions_never_look_at_data(gradients: bool) -> None:
    """On fake tensors a value that Python reads is an error."""
    with FakeTensorMode(), torch.set_grad_enabled(gradients):
        r = cases.rows(3, (4, 5)).replace(torch.empty_like)
        ids = {"seed": 1, "sample_ids": r.sample_ids, "step_ids": 7}
        ops.philox_normal((5,), **ids)
        for step in (ops.sde_step, ops.sde_step_x0, ops.sde_step_):
            step(r.x, r.v, r.coef, v_uncond=r.v_uncond, guidance=4.5, **ids)
        ops.tweedie_(r.x, r.noise, 0.5)
        ops.gain_advantages(r.rewards, mask=r.mask)
        ops.gain_advantages_(r.rewards, normalize="centered")
        v = r.v.requires_grad_(gradients)
        logp, mean = ops.sde_logprob(r.x, v, r.x_next, r.coef, return_mean=True)
        clean = ops.tweedie(r.x, v, r.coef[:, 3])
        loss, _ = ops.policy_loss(
            r.x, v, r.x_next, r.coef, r.logp_old, r.advantages, v_ref=r.v_ref, kl_weight=0.1
        )
        if gradients:
            (logp.sum() + mean.sum() + clean.sum() + loss).backward()
            assert v.grad is not None


@pytest.mark.parametrize("op", cases.OPS)
def test_ops_on_fake_tensors_of_a_gpu(op: str) -> None:
    def on_gpu(arg: object) -> object:
        if not isinstance(arg, Tensor):
            return arg
        return torch.empty(arg.shape, dtype=arg.dtype, device="cuda")

    arguments = cases.arguments(cases.rows(3, (4, 5)), True)[op]
    with FakeTensorMode(), torch.no_grad():
        results = getattr(torch.ops.sfgrpo, op)(*map(on_gpu, arguments))
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result.device.type == "cuda"
