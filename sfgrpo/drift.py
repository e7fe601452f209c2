"""How far rollout and training are apart, and how far rounding may take them.

Both compute the velocity of the same state, at different batch sizes, and matrix products of
different sizes add in different orders: a GPU's bf16 velocities differ by 1e-3 to 5e-3 of their
size. A velocity that is off by e moves the step's mean by b e and with it the log-density (a mean
over D elements) by

    (b e)^2 / (2 n^2)  +  a cross term with the step's noise, of size (b / n) e / sqrt(D)

The first does not fall with D, and b / n is 0.3 in the middle of SD3.5's schedule and 167 at
DDIM-SDE's last noisy step: rounding alone then fills any clip range. That is why the ratio's old
log-density is taken from the training forward (`train.old_logp`), and why a step with too little
noise is left out (`sample.min_noise`).

What remains to be told from rounding is a broken pair: dropout, another guidance, other weights in
training than in the rollout. Each step has a budget, the formula above for a relative difference
`train.drift_budget` of the velocities (`ROUNDING` by default), and the run stops when the drift
of its steps is above their budgets on average. A dropout of 0.01 changes the velocities of the
embedded model by .03 to .09, twice and more of what bf16 is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfgrpo.config import Recipe

ROUNDING = {"fp32": 2**-16, "fp16": 2**-7, "bf16": 2**-6}
"""Relative difference of two velocities of one state that passes for rounding. Embedded model, fp32
on a CPU: 2e-7; bf16 on GPUs: up to 5e-3, a third of what is allowed."""
TF32 = 2**-7
"""The same for fp32 where matrix products may round their operands to 10 bits."""
ARITHMETIC = 2**-22
"""Rounding of a x + b v and of the stored state, of values of size 2 in fp32."""
SUMMATION = 2**-20
"""Rounding of the sum over the elements and of the constants, of numbers of size 1 to 5."""
VELOCITY = 2.0
"""Root mean square of x_1 - x_0; latents have a standard deviation of 1 to 1.7."""


class Disagreement(RuntimeError):
    """Rollout and training compute different log-densities; the message says how different."""


@dataclass(frozen=True)
class Drift:
    """|logp in training - logp at sampling| before the first update, over the rows of all ranks."""

    mean: float
    largest: float
    per_step: list[float]
    """Mean at each step of the sampler; 0 at noise-free steps."""

    def of(self, budget: Sequence[float]) -> list[float]:
        """Each step's drift in its budget (`budget`)."""
        return [mean / most for mean, most in zip(self.per_step, budget, strict=True)]


def tolerance(recipe: Recipe, device: torch.device) -> float:
    """The relative difference of velocities that passes for rounding."""
    if recipe.train.drift_budget is not None:
        return recipe.train.drift_budget
    products = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if recipe.model.dtype == "fp32" and device.type == "cuda" and products:
        return TF32
    return ROUNDING[recipe.model.dtype]


def budget(table: Tensor, *, tolerance: float, guidance: float, elements: int) -> list[float]:
    """The largest drift of each step that rounding explains; infinite at noise-free steps.

    Args:
        table: `[T, 4]` coefficients.
        tolerance: relative difference of the velocities.
        guidance: scale w of classifier-free guidance; the errors of both velocities add up to
            sqrt(w^2 + (w - 1)^2) of one.
        elements: D, numbers of one latent.
    """
    _, b, n, _ = table.double().cpu().unbind(-1)
    amplified = (guidance**2 + (guidance - 1) ** 2) ** 0.5
    error = b.abs() * tolerance * VELOCITY * amplified + ARITHMETIC
    shift = (error / n).square() / 2 + error / n / elements**0.5 + SUMMATION
    return torch.where(n > 0, shift, torch.inf).tolist()
