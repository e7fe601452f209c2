"""How good a credit signal is, from rewards and advantages alone.

Shapes: P prompts, N trajectories per group, T steps; `rewards [P, N, T + 1]` are those of the clean
estimates, the final image last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfgrpo.credit import gains


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over all elements, float64; nan if either is constant."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    return (a @ b) / (a.norm() * b.norm())


def within(values_PN: Tensor) -> Tensor:
    """What is left of each value without its group's mean, float64 `[P, N, ...]`."""
    return values_PN.double() - values_PN.double().mean(1, keepdim=True)


def std_in_groups(values_PN: Tensor) -> float:
    """Root of the mean variance within groups, with N - 1."""
    size = values_PN.shape[1]
    return float((within(values_PN).square().sum(1) / (size - 1)).mean().sqrt())


def shares(rewards_PNS: Tensor) -> Tensor:
    """How much of the final reward's variance within groups each step explains, float64 `[T]`.

        share_k = cov(gain_k, r_T) / var(r_T)

    A step's share is the slope of its gain on the final reward. Gains telescope and groups start
    from one noise, so that the shares sum to 1; one is negative if what the step brought was lost
    again. nan if the final reward differs in no group.
    """
    left_PNS = within(rewards_PNS)
    final_PN1 = left_PNS[..., -1:]
    return (gains(left_PNS) * final_PN1).sum((0, 1)) / final_PN1.square().sum()


def jackknife(statistic: Callable[[Tensor], Tensor], prompts: int) -> Tensor:
    """Standard error of a statistic of so many prompts, by leaving each out; nan of one prompt.

    Args:
        statistic: from the int64 rows of the prompts that stay to numbers of any shape.

    Source: Efron, Tibshirani, An Introduction to the Bootstrap (1993), eq. 11.5.
    """
    rows = torch.arange(prompts)
    if prompts == 1:
        return torch.full_like(statistic(rows), math.nan)
    without = torch.stack([statistic(rows[rows != left]) for left in range(prompts)])
    return ((prompts - 1) * without.var(0, correction=0)).sqrt()


def repeat_noise(finals_RPN: Tensor) -> float:
    """Standard deviation of the reward of one image, from R scorings of the same images."""
    return float(finals_RPN.double().var(0).mean().sqrt())
