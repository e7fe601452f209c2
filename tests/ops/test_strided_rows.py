"""Operands whose rows are contiguous but lie apart, as a step of stored trajectories does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ops.measure import peak_memory_of_cpu
from sfgrpo import ops
from tests.support.ops.cases import BF16, F16, F32, F64, OPS, arguments, call, rows, same_bits


def _apart(tensor: Tensor) -> Tensor:
    """The same rows, in every other place."""
    return tensor.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize("name", sorted({*OPS} - {"gain_advantages", "gain_advantages_"}))
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize(("batch", "shape"), [(23, (90,)), (3, (2, 1025)), (1, (1, 7))])
def test_the_same_bits(
    name: str, full: bool, dtype: torch.dtype, batch: int, shape: tuple[int, ...]
) -> None:
    """Short rows are gathered in a block, long ones read where they are."""
    args = arguments(rows(batch, shape, dtype, dtype), full)[name]
    apart = tuple(_apart(a) if isinstance(a, Tensor) and a.ndim > 0 else a for a in args)
    for one, other in zip(call(name, apart), call(name, args), strict=True):
        assert same_bits(one, other)


def test_one_row_for_all() -> None:
    r = rows(23, (90,))
    v = r.v[:1]
    expected = ops.sde_logprob(r.x, v.repeat(23, 1), r.x_next, r.coef)
    assert same_bits(ops.sde_logprob(r.x, v.expand(23, 90), r.x_next, r.coef), expected)


@pytest.mark.parametrize("shape", [(90,), (2, 1025)])
def test_nothing_is_copied(shape: tuple[int, ...]) -> None:
    r = rows(64, shape)
    x, v, x_next = map(_apart, (r.x, r.v, r.x_next))
    assert peak_memory_of_cpu(lambda: ops.sde_logprob(x, v, x_next, r.coef)) <= 4 * 64
    assert peak_memory_of_cpu(lambda: ops.tweedie(x, v, 0.5)) == r.x.nbytes
    transposed = r.x.flatten(1).T.contiguous().T  # no row of it is contiguous
    taken = peak_memory_of_cpu(lambda: ops.tweedie(transposed, r.v.flatten(1), 0.5))
    assert taken >= 2 * r.x.nbytes  # or the lines above could not fail
