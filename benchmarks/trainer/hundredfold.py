"""The colour reward in another unit, for `benchmarks/claims/mixtures.yaml`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sfgrpo.rewards import Metadata
from sfgrpo.rewards import colour as ours


class Scaled(ours.ColourReward):
    """The colour reward, times `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__(scale=0.25, least_share=0.05)
        self._factor = factor

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self._factor * super().__call__(images, prompts, metadata)


def colour(factor: float = 100.0) -> Scaled:
    """From 0 to `factor`, otherwise as the reward "colour" is by default."""
    return Scaled(factor)
