"""Several rewards of the same trajectories, before they become one advantage.

Shapes: P prompts, N trajectories per group, S = T + 1 states, as in `sfgrpo.credit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a recipe names rules without PyTorch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The scores of every state by every reward."""

    scores: Mapping[str, Tensor]
    """By the reward's name: `[P, N, S]`, the final image last."""
    weights: Mapping[str, float]
    final_only: frozenset[str] = frozenset()
    """The rewards that saw final images alone."""

    @classmethod
    def one(cls, rewards_PNS: Tensor) -> Rewards:
        """A single reward of weight 1."""
        return cls(scores={"reward": rewards_PNS}, weights={"reward": 1.0})

    @cached_property
    def total(self) -> Tensor:
        """The weighted sum `[P, N, S]`."""
        first, *_ = self.scores.values()
        total = first.new_zeros(first.shape)
        for name, scores in self.scores.items():
            total += self.weights[name] * scores
        return total

    def __getitem__(self, groups_P: Tensor) -> Rewards:
        """Those of some groups."""
        return replace(self, scores={name: s[groups_P] for name, s in self.scores.items()})
