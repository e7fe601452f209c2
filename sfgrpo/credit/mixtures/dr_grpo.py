"""Without division by the standard deviation: a group counts as much as its rewards differ.

    advantage = sum_k w_k (c_k - mean c_k)      c_k what the rule normalises, by reward k

It is linear in the rewards, and in their units, which `credit.clamp` then limits, too.

Dr. GRPO, Liu et al. 2025, arXiv 2503.20783.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo.config import Credit
from sfgrpo.credit.mixtures import Rewards, centred, limited, raw


def advantages(rewards: Rewards, trainable_T: Tensor, options: Credit) -> Tensor:
    """The sum without its mean in the group, `[P, N, T]`."""
    each = raw(rewards, trainable_T, options)
    total = torch.stack([rewards.weights[name] * c for name, c in each.items()]).sum(0)
    return limited(centred(total, trainable_T, options), options)
