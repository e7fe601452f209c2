"""The weighted sum of the rewards is what is credited: as large as a reward varies, so much it
counts.

Flow-GRPO, Liu et al. 2025, arXiv 2505.05470.
"""

from __future__ import annotations

from torch import Tensor

from sfgrpo.config import Credit
from sfgrpo.credit.mixtures import Rewards, by_rule


def advantages(rewards: Rewards, trainable_T: Tensor, options: Credit) -> Tensor:
    """What the rule makes of the sum, `[P, N, T]`."""
    return by_rule(rewards.total, trainable_T, options)
