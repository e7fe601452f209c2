"""Results too large for caches are written past them: the same bits as of each row alone.

A row alone is below ``kStreamed`` (csrc/rows.h), three of them together are above it, and their odd
length puts the rows at every alignment.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfgrpo import ops

ROWS, ELEMENTS = 3, 1_100_001
COEF = torch.tensor([0.9, -0.1, 0.3, 0.5]).expand(ROWS, 4)
Operands = tuple[Tensor, ...]


def _step(x: Tensor, v: Tensor, other: Tensor) -> Operands:
    return ops.sde_step(x, v, COEF[: len(x)], noise=other)


def _drawn(x: Tensor, v: Tensor, other: Tensor) -> Operands:
    ids = x[:, 0].view(torch.int32).long()  # whatever the row
    return ops.sde_step_x0(x, v, COEF[: len(x)], seed=1, sample_ids=ids, step_ids=2)


def _gradients(x: Tensor, v: Tensor, other: Tensor) -> Operands:
    x, v, other = (tensor.clone().requires_grad_() for tensor in (x, v, other))
    logp, mean = ops.sde_logprob(x, v, other, COEF[: len(x)], return_mean=True)
    return (mean, *torch.autograd.grad(logp.sum() + mean.sum(), (x, v, other)))


def _loss(x: Tensor, v: Tensor, other: Tensor) -> Operands:
    v = v.clone().requires_grad_()
    rows = len(x)
    loss, _ = ops.policy_loss(
        *(x, v, other, COEF[:rows], None, torch.ones(rows)),
        v_ref=x, kl_weight=0.1, weights=torch.ones(rows),
    )  # fmt: skip
    return torch.autograd.grad(loss, v)


@pytest.mark.parametrize(
    "call", [_step, _drawn, _gradients, _loss, lambda x, v, other: (ops.tweedie(x, v, 0.3),)]
)
def test_the_bits_of_each_row_alone(call: Callable[..., Operands]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v, other = (torch.randn(ROWS, ELEMENTS, generator=generator) for _ in range(3))
    together = call(x, v, other)
    for row in range(ROWS):
        one = slice(row, row + 1)
        for whole, alone in zip(together, call(x[one], v[one], other[one]), strict=True):
            assert torch.equal(whole[one], alone)
            assert alone.any()
