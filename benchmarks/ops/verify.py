"""Makes an entry callable, and checks what it returns against the published form.

The call that is checked is the call that is timed.  Where an implementation draws noise of its
own, the noise is recovered from its results: it must be standard normal, and the published form,
given that noise, must return the same.  Ours draws the noise that the operands' ids determine,
so there nothing is left open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.operands import cloned
from benchmarks.ops.table import COMPILE, IN_PLACE, OURS, PEERS, Call, Entry, Row

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}
"""Largest difference relative to the largest value: many float32 roundings, one of bfloat16."""

DEVIATIONS = 6.0
"""How far the noise's mean and variance may lie from 0 and 1, in their own standard deviations."""


class _Predicted(torch.autograd.Function):
    """The velocity as a network returns it, without a copy: no leaf, so it may be overwritten."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return v.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def with_gradient(call: Call) -> Call:
    """The call and its gradient in ``v``, which is the result of a node, as a network's is."""

    def run(o: Any) -> tuple[Tensor, ...]:
        v: Any = _Predicted.apply(o.v.detach().requires_grad_())
        (result,) = call(replace(o, v=v))
        (grad,) = torch.autograd.grad(result, v, torch.ones_like(result))
        return result.detach(), grad

    return run


def callable_form(row: Row, implementation: str) -> Call:
    """The implementation as it is called: compiled if it is to be, with its gradient."""
    call = row.calls[implementation]
    if implementation == COMPILE:
        torch.compiler.reset()  # generated code fixes the number of threads
        call = torch.compile(call, fullgraph=True, dynamic=False)
    if row.backward and implementation not in row.closed_form:
        return with_gradient(call)
    return call


def _check_noise(noise: Tensor, what: str) -> None:
    count = noise.numel()
    mean, variance = float(noise.double().mean()), float(noise.double().var(correction=0))
    off = max(abs(mean) * math.sqrt(count), abs(variance - 1) * math.sqrt(count / 2))
    if not off <= DEVIATIONS:
        raise AssertionError(f"{what}: noise has mean {mean:.3g} and variance {variance:.3g}")


def check(row: Row, implementation: str, given: Any, results: tuple[Tensor, ...]) -> None:
    """Compare results with the published form's.

    Args:
        given: the operands before the call, with the noise that ours draws.

    Raises:
        AssertionError: a result differs, or drawn noise is not standard normal.
    """
    what = f"{row.name} {row.direction}, {implementation}"
    if row.draws:
        noise = row.draws(given, results)
        _check_noise(noise, what)
        if implementation not in (OURS, IN_PLACE):
            given = replace(given, noise=noise)
    if row.draws and row.moves == ("noise",):
        expected: tuple[Tensor, ...] = (given.noise,)
    else:
        expected = callable_form(row, PEERS)(given)
    for got, want in zip(results, expected, strict=True):
        difference = float((got.float() - want.float()).abs().max())
        scale = float(want.float().abs().max())
        if not difference <= TOLERANCE[got.dtype] * scale:
            raise AssertionError(f"{what}: differs by {difference:.3g} (scale {scale:.3g})")


def runner(entry: Entry, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """The entry as a function without arguments, checked and warm.

    Implementations that work in place have operands of their own and meet, from the second call
    on, what they left there.  Numbers stay finite and normal (|a| < 1, |t| < 1, a gradient that
    keeps its size), so the times do not change.
    """
    row, name = entry.row, entry.implementation
    given = row.operands(entry.shape, entry.precision, device)
    mine = replace(given, noise=None) if row.draws else given
    if name == IN_PLACE:
        mine = cloned(mine)
    call = callable_form(row, name)
    check(row, name, given, call(mine))

    def run() -> tuple[Tensor, ...]:
        return call(mine)

    return run
