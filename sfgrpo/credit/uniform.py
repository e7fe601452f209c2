"""Uniform credit: the group-normalised final reward on every step.

Flow-GRPO, Liu et al. 2025, arXiv 2505.05470.
"""

from __future__ import annotations

from torch import Tensor

from sfgrpo import ops
from sfgrpo.config import Credit
from sfgrpo.credit import rule, statistics_mask


def final_reward(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The final reward at every step, `[P, N, T]`."""
    return rewards_PNS[..., -1:].expand(*rewards_PNS.shape[:2], len(trainable_T))


@rule(estimates=False, raw=final_reward)
def advantages(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The final reward's advantage in its group, `[P, N, T]`."""
    return ops.gain_advantages(
        rewards_PNS,
        normalize="uniform",
        mask=statistics_mask(trainable_T, options),
        clamp=options.clamp,
    )
