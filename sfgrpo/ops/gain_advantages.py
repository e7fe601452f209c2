"""Stepwise credit: rewards of the clean estimates along a trajectory -> advantage of each step.

Savani et al., "Stepwise Credit Assignment for GRPO on Flow-Matching Models" (arXiv 2603.28718):
the gain of step k is g_k = r_{k+1} - r_k, where r_k is the reward of the clean estimate at state k
(0: the starting noise, T: the final image), and its advantage is standardised over the N
trajectories of the prompt's group:

    joint     mean and std over all N x T gains                      (the paper)
    per_step  mean and std over the N gains of each step
    centered  mean per step, std = sqrt(mean over all (g - mean)^2)
    uniform   the final reward's (r_T - mean) / std on every step    (Flow-GRPO)

The std is the population's (ddof 0) and nothing is added to it: a group, or a step under
"per_step", whose std is at most 1e-6 of the group's largest |reward| carries no signal and gets
advantage 0.  Masked gains get 0 and stay out of the statistics of the first three; "uniform"
looks at final rewards, of all N trajectories, whatever the mask says about steps.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfgrpo.ops import _checks, _overlap
from sfgrpo.ops._calls import in_place
from sfgrpo.ops._library import Choice, define, vectorise
from sfgrpo.ops._vmap import fold_into_rows

Normalization = Literal["joint", "per_step", "centered", "uniform"]
NORMALIZATIONS: tuple[Normalization, ...] = ("joint", "per_step", "centered", "uniform")
RELATIVE_STD_FLOOR = 1e-6


def _mean(values: Tensor, mask: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean over the unmasked entries, dims kept; 0 where there are none."""
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    return torch.where(mask, values, 0.0).sum(dims, keepdim=True) / count


class GainOperands(NamedTuple):
    """What both forms take; the one in place writes over the rewards."""

    rewards: Tensor
    """``[P, N, T + 1]``."""
    normalize: Choice
    """Index into NORMALIZATIONS."""
    mask: Tensor | None
    """bool ``[P, N, T]``, True where a step counts."""
    clamp: float | None
    """Largest abs(advantage)."""


def gain_advantages_reference(o: GainOperands) -> Tensor:
    """The specification, in float64.

    Raises:
        RuntimeError: on the CPU, a reward is not finite.
    """
    rewards, mask = o.rewards, o.mask
    if rewards.device.type == "cpu" and not bool(torch.isfinite(rewards).all()):
        raise RuntimeError("rewards: got a value that is not finite, expected finite rewards")
    if rewards.device.type == "mps":  # has no float64
        on_cpu = o._replace(rewards=rewards.cpu(), mask=None if mask is None else mask.cpu())
        return gain_advantages_reference(on_cpu).to("mps")
    r = rewards.double()
    gains = r[:, :, 1:] - r[:, :, :-1]
    counts = torch.ones_like(gains, dtype=torch.bool) if mask is None else mask
    name = NORMALIZATIONS[o.normalize]
    if name == "uniform":
        values = r[:, :, -1:].expand_as(gains)
        centre = values.mean(1, keepdim=True)
        variance = (values - centre).square().mean(1, keepdim=True)
    else:
        values = gains
        centre = _mean(values, counts, (1, 2) if name == "joint" else (1,))
        spread = (1,) if name == "per_step" else (1, 2)
        variance = _mean((values - centre).square(), counts, spread)
    std = variance.sqrt()
    largest = r.abs().amax((1, 2), keepdim=True)
    alive = std > RELATIVE_STD_FLOOR * largest
    advantages = torch.where(alive, (values - centre) / torch.where(alive, std, 1.0), 0.0)
    if o.clamp is not None:
        advantages = advantages.clamp(-o.clamp, o.clamp)
    return torch.where(counts, advantages, 0.0).float().contiguous()


def gain_advantages__reference(o: GainOperands) -> None:
    """The specification of the op that writes the advantage of step k over the reward of state k.

    The last column keeps the final rewards.
    """
    o.rewards[:, :, :-1] = gain_advantages_reference(o)


def _fake(o: GainOperands) -> Tensor:
    prompts, trajectories, states = o.rewards.shape
    return o.rewards.new_empty((prompts, trajectories, states - 1), dtype=torch.float32)


_op = define(
    "gain_advantages", GainOperands, gain_advantages_reference, _fake, float64_on_gpus=True
)
define(
    "gain_advantages_",
    GainOperands,
    gain_advantages__reference,
    written=("rewards",),
    float64_on_gpus=True,
)
_call_in_place = in_place("gain_advantages_")
vectorise("gain_advantages", fold_into_rows(_op))


def gain_advantages(
    rewards: Tensor,
    *,
    normalize: Normalization = "joint",
    mask: Tensor | None = None,
    clamp: float | None = 5.0,
) -> Tensor:
    """Advantages of every step of every trajectory, from rewards of the clean estimates.

    Traffic per element (fp32): 8 bytes: reads a reward, writes an advantage.

    Args:
        rewards: ``[P, N, T + 1]`` float32 or float64: P prompts, N >= 1 trajectories per group,
            T >= 1 steps; index 0 is the starting noise, T the final image.
        normalize: "joint", "per_step", "centered" or "uniform", see the module's text.
        mask: bool ``[T]`` or ``[P, N, T]``, True where a step counts (default: all).
        clamp: advantages are limited to [-clamp, clamp]; None leaves them alone.

    Returns:
        float32 ``[P, N, T]``, detached: rewards are data.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        RuntimeError: on the CPU, a reward is not finite.
    """
    o = _checked(rewards, normalize, mask, clamp)
    return _op(*o._replace(rewards=rewards.detach()))


def gain_advantages_(
    rewards: Tensor,
    *,
    normalize: Normalization = "joint",
    mask: Tensor | None = None,
    clamp: float | None = 5.0,
) -> Tensor:
    """``gain_advantages`` that writes the advantage of step k over the reward of state k.

    Traffic per element (fp32): 8 bytes: reads a reward, writes an advantage.

    Arguments and errors as in ``gain_advantages``; rewards that overlap, each other or the mask,
    are a ValueError, and while gradients are recorded rewards that require grad a RuntimeError.

    Returns:
        The view ``rewards[:, :, :T]``, in the dtype of ``rewards``; ``rewards[:, :, T]`` keeps the
        final rewards.
    """
    o = _checked(rewards, normalize, mask, clamp)
    _overlap.overwritable(o, ("rewards",))
    _call_in_place(o)
    return rewards.narrow(2, 0, rewards.shape[2] - 1)


def _checked(
    rewards: Tensor, normalize: str, mask: Tensor | None, clamp: float | None
) -> GainOperands:
    _checks.dense("rewards", rewards)
    if rewards.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rewards: got dtype {rewards.dtype}, expected float32 or float64")
    if rewards.ndim != 3 or rewards.shape[1] < 1 or rewards.shape[2] < 2:
        raise ValueError(
            f"rewards: got shape {tuple(rewards.shape)}, expected [P, N, T + 1] with N, T >= 1"
        )
    names: tuple[str, ...] = NORMALIZATIONS
    if normalize not in names:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {names}")
    if clamp is not None:
        clamp = _checks.number("clamp", clamp, low=0.0)
    shape = (rewards.shape[0], rewards.shape[1], rewards.shape[2] - 1)
    if mask is not None:
        mask = _full_mask(mask, shape, rewards)
    return GainOperands(rewards, names.index(normalize), mask, clamp)


def _full_mask(mask: Tensor, shape: tuple[int, int, int], rewards: Tensor) -> Tensor:
    _checks.dense("mask", mask, "a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool")
    if tuple(mask.shape) not in ((shape[2],), shape):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {shape[2:]} or {shape}")
    if mask.device != rewards.device:
        raise ValueError(f"mask: got device {mask.device}, expected {rewards.device}")
    return mask.expand(shape)
