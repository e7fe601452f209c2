"""What the contenders of a row are called with: one Flow-SDE step of a batch, or rewards.

Flow-GRPO's terms (``sigma``, ``eta``) and ours (``coef``) describe the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.ops.shapes import Precision, Shape
from sfgrpo import ops, sde

SIGMAS = (1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0)
"""Stable Diffusion 3.5's schedule of ten steps."""

STEP, ETA = 4, 0.7
SEED, STEP_ID = 1, 2
"""Identity of the noise that ours draws."""


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of a batch.  Latents are ``[B, ...]``; what is per row is ``[B]`` unless noted."""

    x: Tensor
    v: Tensor
    v_ref: Tensor
    x_next: Tensor
    noise: Tensor | None
    """The noise that ours draws for these ids; None asks a contender to draw its own."""
    coef: Tensor
    sigma: Tensor
    """``[B, 1, ...]``, broadcasts over the latents, as does ``sigma_next``."""
    sigma_next: Tensor
    times: Tensor
    logp_old: Tensor
    advantages: Tensor
    sample_ids: Tensor
    eta: float = ETA
    clip: float = 1e-4
    beta: float = 0.04


@dataclass(frozen=True)
class Rewards:
    """Rewards of the clean estimates, ``[P, N, T + 1]``."""

    rewards: Tensor


Operands = TypeVar("Operands", Transition, Rewards)


@lru_cache(maxsize=1)  # entries of one shape follow each other
def transition(shape: Shape, precision: Precision, device: torch.device) -> Transition:
    """Random operands, the same in every process; made on the CPU.

    The log-densities "when sampled" of every fourth row are off by more than the clipping range,
    as they are after a few updates; the others' are well within.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    size, rows = shape.size, shape.batch
    ids = torch.arange(rows)
    x, v, v_ref = normal(*size), normal(*size).to(precision.v), normal(*size).to(precision.v)
    noise = ops.philox_normal(shape.sample, seed=SEED, sample_ids=ids, step_ids=STEP_ID)
    coef = sde.coefficients(SIGMAS, "flow", ETA)[STEP].repeat(rows, 1)
    x_next, logp = ops.sde_step(x, v, coef, noise=noise)
    sigma = torch.full((rows, *(1,) * len(shape.sample)), SIGMAS[STEP])
    made = Transition(
        x=x,
        v=v,
        v_ref=v_ref,
        x_next=x_next,
        noise=noise,
        coef=coef,
        sigma=sigma,
        sigma_next=torch.full_like(sigma, SIGMAS[STEP + 1]),
        times=sigma.reshape(-1),
        logp_old=logp + 1e-3 * (ids % 4 == 3),
        advantages=normal(rows),
        sample_ids=ids,
    )
    return _moved(made, device)


@lru_cache(maxsize=1)
def rewards(shape: Shape, precision: Precision, device: torch.device) -> Rewards:
    """Random rewards; always float32."""
    generator = torch.Generator().manual_seed(0)
    return Rewards(torch.randn(shape.size, generator=generator).to(device))


def _moved(o: Operands, device: torch.device) -> Operands:
    return replace(o, **{n: t.to(device) for n, t in vars(o).items() if isinstance(t, Tensor)})


def cloned(o: Operands) -> Operands:
    """The same operands in storage of their own, for contenders that overwrite them."""
    return replace(o, **{n: t.clone() for n, t in vars(o).items() if isinstance(t, Tensor)})
