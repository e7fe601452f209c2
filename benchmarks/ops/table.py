"""The benchmark table: op x direction x shape x dtype x implementation, from one registry.

Adding an op is adding a ``Row`` to ``ROWS`` (and its published form to ``published.py``).

Left out, because it would add time and no knowledge:

- bf16 velocities for the action head and the embedded model, which train in fp32, and for
  ``philox_normal`` and ``gain_advantages``, which read no velocity;
- ``torch.compile`` of ``philox_normal``, whose published form is one call of the generator;
- the backward of ``tweedie``: one multiplication of the incoming gradient, eager in every form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import by_hand, ours, published
from benchmarks.ops.operands import rewards, transition
from benchmarks.ops.shapes import BF16, FP32, LATENTS, REWARDS, Precision, Shape

Call = Callable[[Any], tuple[Tensor, ...]]
"""Operands -> results; draws noise of its own where the operands' is None."""

PEERS = "peers' eager"
HAND = "eager by hand"
COMPILE = "torch.compile"
OURS = "sfgrpo"
IN_PLACE = "sfgrpo, in place"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One op in one direction."""

    name: str
    op: str
    """The public function of ``sfgrpo.ops``."""

    calls: dict[str, Call]
    """Implementation -> how it is called.  The published one also says what is right.  In a row
    with a backward, a call returns what is differentiated in ``v`` (see ``closed_form``)."""

    moves: tuple[str, ...]
    """Operands and results that must be read or written at least, by name; a name may repeat.
    What is per row (coefficients, log-densities) is not counted."""

    backward: bool = False
    closed_form: tuple[str, ...] = ()
    """Implementations that return their gradient themselves, after what is differentiated."""

    draws: Callable[[Any, tuple[Tensor, ...]], Tensor] | None = None
    """For rows that draw noise: the noise in the results, so that it can be judged."""

    shapes: tuple[Shape, ...] = LATENTS
    operands: Callable[[Shape, Precision, torch.device], Any] = transition

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def title(self) -> str:
        return self.name + ("+backward" if self.backward else "")

    def bytes_per_element(self, precision: Precision) -> int:
        """Bytes that must be moved for each element of a latent."""
        return sum(_item_size(name, precision) for name in self.moves)

    def bytes(self, shape: Shape, precision: Precision) -> int:
        """Bytes that must be moved for a batch."""
        return sum(_item_size(name, precision) * _elements(name, shape) for name in self.moves)


def _item_size(name: str, precision: Precision) -> int:
    return precision.v.itemsize if name in ("v", "v_ref", "grad_v") else 4


def _elements(name: str, shape: Shape) -> int:
    if name == "advantages":  # of T steps, where rewards are of T + 1 states
        return shape.elements * (shape.sample[-1] - 1) // shape.sample[-1]
    return shape.elements


def _noise_of_step(o: Any, results: tuple[Tensor, ...]) -> Tensor:
    a, b, n, _ = o.coef.reshape(-1, 4, *(1,) * (o.x.ndim - 1)).unbind(1)
    return (results[0] - a * o.x - b * o.v.float()) / n


_STEP: dict[str, Call] = {
    PEERS: published.sde_step,
    HAND: by_hand.sde_step,
    COMPILE: by_hand.sde_step,
    OURS: ours.sde_step,
    IN_PLACE: ours.sde_step_,
}

ROWS = (
    Row(
        name="sde_step",
        op="sde_step",
        calls=_STEP,
        moves=("x", "v", "x_next"),
        draws=_noise_of_step,
    ),
    Row(
        name="sde_step, noise given",
        op="sde_step",
        calls=_STEP,
        moves=("x", "v", "noise", "x_next"),
    ),
    Row(
        name="sde_step_x0",
        op="sde_step_x0",
        calls={
            PEERS: published.sde_step_x0,
            HAND: by_hand.sde_step_x0,
            COMPILE: by_hand.sde_step_x0,
            OURS: ours.sde_step_x0,
        },
        moves=("x", "v", "x_next", "x0_hat"),
        draws=_noise_of_step,
    ),
    Row(
        name="sde_logprob",
        op="sde_logprob",
        calls={
            PEERS: published.sde_logprob,
            HAND: by_hand.sde_logprob,
            COMPILE: by_hand.sde_logprob,
            OURS: ours.sde_logprob,
        },
        moves=("x", "v", "x_next"),
    ),
    Row(
        name="sde_logprob",
        op="sde_logprob",
        calls={
            PEERS: published.sde_logprob,
            HAND: by_hand.sde_logprob_with_gradient,
            COMPILE: by_hand.sde_logprob,
            OURS: ours.sde_logprob,
        },
        moves=("x", "v", "x_next", "x", "v", "x_next", "grad_v"),
        backward=True,
        closed_form=(HAND,),
    ),
    Row(
        name="policy_loss",
        op="policy_loss",
        calls={
            PEERS: published.policy_loss,
            HAND: by_hand.policy_loss,
            COMPILE: by_hand.policy_loss,
            OURS: ours.policy_loss,
        },
        moves=("x", "v", "x_next", "v_ref"),
    ),
    Row(
        name="policy_loss",
        op="policy_loss",
        calls={
            PEERS: published.policy_loss,
            HAND: by_hand.policy_loss_with_gradient,
            COMPILE: by_hand.policy_loss,
            OURS: ours.policy_loss,
            IN_PLACE: ours.policy_loss_reusing_v,
        },
        moves=("x", "v", "x_next", "v_ref", "x", "v", "x_next", "v_ref", "grad_v"),
        backward=True,
        closed_form=(HAND,),
    ),
    Row(
        name="tweedie",
        op="tweedie",
        calls={
            PEERS: published.tweedie,
            HAND: by_hand.tweedie,
            COMPILE: by_hand.tweedie,
            OURS: ours.tweedie,
            IN_PLACE: ours.tweedie_,
        },
        moves=("x", "v", "x0_hat"),
    ),
    Row(
        name="gain_advantages",
        op="gain_advantages",
        calls={
            PEERS: published.gain_advantages,
            HAND: by_hand.gain_advantages,
            COMPILE: by_hand.gain_advantages,
            OURS: ours.gain_advantages,
            IN_PLACE: ours.gain_advantages_,
        },
        moves=("rewards", "advantages"),
        shapes=REWARDS,
        operands=rewards,
    ),
    Row(
        name="philox_normal",
        op="philox_normal",
        calls={PEERS: published.philox_normal, OURS: ours.philox_normal},
        moves=("noise",),
        draws=lambda o, results: results[0],
    ),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table."""

    row: Row
    shape: Shape
    precision: Precision
    implementation: str

    @property
    def bytes(self) -> int:
        return self.row.bytes(self.shape, self.precision)

    @property
    def group(self) -> str:
        """What is compared with each other."""
        return " | ".join(self._where)

    @property
    def _where(self) -> tuple[str, ...]:
        return self.row.name, self.row.direction, self.shape.name, self.precision.name

    def __str__(self) -> str:
        return "-".join(
            re.sub(r"[^\w.+]+", "_", part) for part in (*self._where, self.implementation)
        )


def _precisions(row: Row, shape: Shape) -> tuple[Precision, ...]:
    reads_v = "v" in row.moves and shape.name not in ("action head", "embedded")
    return (FP32, BF16) if reads_v else (FP32,)


def entries() -> Iterator[Entry]:
    """All entries, those of one shape and dtype in turn: they share operands."""
    for shape in (*LATENTS, *REWARDS):
        for precision in (FP32, BF16):
            for row in ROWS:
                if shape not in row.shapes or precision not in _precisions(row, shape):
                    continue
                for name in row.calls:
                    yield Entry(row=row, shape=shape, precision=precision, implementation=name)


ENTRIES = tuple(entries())

BY_TITLE = {row.title: row for row in ROWS}
