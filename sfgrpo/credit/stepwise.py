"""Stepwise credit: each step's own gain, normalised over the group.

Stepwise-Flow-GRPO, Savani et al. 2026, arXiv 2603.28718, sec. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.config import Credit
from sfgrpo.credit import statistics_mask


def advantages(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The gain of each step, or of its block of `options.stride` steps, `[P, N, T]`."""
    return ops.gain_advantages(
        rewards_PNS if options.stride == 1 else _blocks(rewards_PNS, options.stride),
        normalize=options.normalize,
        mask=statistics_mask(trainable_T, options),
        clamp=options.clamp,
    )


def _blocks(rewards_PNS: Tensor, stride: int) -> Tensor:
    """Rewards whose per-step gains are the block gains of the given ones."""
    steps = rewards_PNS.shape[-1] - 1
    step = torch.arange(steps, device=rewards_PNS.device)
    start = step // stride * stride
    end = (start + stride).clamp_max(steps)
    block_gains = rewards_PNS[..., end] - rewards_PNS[..., start]
    first = rewards_PNS[..., :1]
    return torch.cat([first, first + block_gains.cumsum(-1)], dim=-1)
