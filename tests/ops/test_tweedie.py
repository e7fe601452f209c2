"""The clean estimate: exact on a straight line, differentiable."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import ops
from tests.support.ops import budget
from tests.support.ops.cases import DTYPES, F64, SHAPES, poisoned, reference, rows


def test_recovers_the_data_from_the_true_velocity() -> None:
    r = rows(4, (3, 50), F64, F64)
    data, noise, t = r.x, r.noise, r.coef[:, 3]
    state = (1 - t)[:, None, None] * data + t[:, None, None] * noise
    torch.testing.assert_close(ops.tweedie(state, noise - data, t), data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (0,)])
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_against_the_reference(
    shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    r = rows(3, shape, x_dtype, v_dtype)
    t = r.coef[:, 3].contiguous()
    with poisoned():
        got = ops.tweedie(r.x, r.v, t)
    (eager,) = reference("tweedie")(r.x, r.v, t, 0.0)
    (exact,) = reference("tweedie")(r.x.double(), r.v.double(), t.double(), 0.0)
    budget.check(got, eager, exact, "x0_hat")


@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_are_the_bits_of_their_parts(threads: int) -> None:
    """Parts of less than a block, rows of more than the blocks that the kernel takes at once."""
    r = rows(3, (70_001,))
    t = r.coef[:, 3].contiguous()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = ops.tweedie(r.x, r.v, t)
        written = ops.tweedie_(r.x, r.v.clone(), t)
    finally:
        torch.set_num_threads(before)
    parts = [
        ops.tweedie(x, v, t) for x, v in zip(r.x.split(997, 1), r.v.split(997, 1), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(written, whole)


def test_one_time_for_all_rows() -> None:
    r = rows(3, (11,))
    assert torch.equal(ops.tweedie(r.x, r.v, 0.3), ops.tweedie(r.x, r.v, torch.full((3,), 0.3)))
    assert torch.equal(ops.tweedie(r.x, r.v, 0.0), r.x)


def test_gradcheck() -> None:
    r = rows(3, (2, 5), F64, F64)
    t = r.coef[:, 3].contiguous()
    leaves = (r.x.requires_grad_(), r.v.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, v: ops.tweedie(x, v, t), leaves)


def test_gradients_keep_their_dtypes() -> None:
    r = rows(3, (6,), torch.float32, torch.bfloat16)
    x, v = r.x.requires_grad_(), r.v.requires_grad_()
    ops.tweedie(x, v, 0.25).backward(torch.full_like(r.x, 2.0))
    assert x.grad is not None
    assert v.grad is not None
    assert (x.grad.dtype, v.grad.dtype) == (torch.float32, torch.bfloat16)
    assert bool((x.grad == 2.0).all())
    assert bool((v.grad == -0.5).all())
