"""Stepwise credit: each step's own gain, normalised over the group.

Stepwise-Flow-GRPO, Savani et al. 2026, arXiv 2603.28718, sec. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.config import Credit
from sfgrpo.credit import block_states, rule, statistics_mask


def block_gains(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The gain of each step's block, `[P, N, T]`; with `options.stride` 1, of the step."""
    start_T, end_T = block_states(trainable_T, options)
    return rewards_PNS[..., end_T] - rewards_PNS[..., start_T]


@rule(raw=block_gains)
def advantages(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The gain of each step, or of its block of `options.stride` steps, `[P, N, T]`."""
    if options.stride > 1:
        rewards_PNS = with_gains(rewards_PNS, block_gains(rewards_PNS, trainable_T, options))
    return ops.gain_advantages(
        rewards_PNS,
        normalize=options.normalize,
        mask=statistics_mask(trainable_T, options),
        clamp=options.clamp,
    )


def with_gains(rewards_PNS: Tensor, gains_PNT: Tensor) -> Tensor:
    """Rewards that begin as the given ones, and whose steps gain `gains_PNT`."""
    first = rewards_PNS[..., :1]
    return torch.cat([first, first + gains_PNT.cumsum(-1)], dim=-1)
