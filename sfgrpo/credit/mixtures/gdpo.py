"""Group reward-Decoupled Normalization: each reward is normalised within its group before they are
summed, and the sum over the batch.

    A = sum_k w_k A_k,      A_k the rule's advantage by reward k alone
    advantage = (A - mean A) / std A      over all groups, trajectories and steps

GDPO, Liu et al. 2026, arXiv 2601.05242. The std is the population's, and nothing is added to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo.config import Credit
from sfgrpo.credit.mixtures import Rewards, counted, limited, of_each
from sfgrpo.ops.gain_advantages import RELATIVE_STD_FLOOR


def advantages(
    rewards: Rewards, trainable_T: Tensor, options: Credit, *, batch: bool = True
) -> Tensor:
    """The normalised sum `[P, N, T]`; without `batch`, the sum itself."""
    each = of_each(rewards, trainable_T, options)
    total = torch.stack([rewards.weights[name] * a.double() for name, a in each.items()]).sum(0)
    if batch:
        values = total[..., counted(trainable_T, options)]
        std, mean = torch.std_mean(values, correction=0)
        # Rewards that cancel leave rounding, which is no signal.
        floor = RELATIVE_STD_FLOOR * sum(map(abs, rewards.weights.values()))
        total = torch.where(std > floor, (total - mean) / std, 0.0)
    return limited(total, options)
