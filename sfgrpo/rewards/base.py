"""What a reward is, and the weighted mixture of several.

A reward is one module of this package with a function `build(**options) -> Reward`; the module's
name is the name in the configuration, so a reward is added by adding a file. A reward of the
user's own is named "package.module:function".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Metadata = Mapping[str, Any]


class Reward(Protocol):
    """Scores images; higher is better.

    A reward of videos has the attribute `takes_video = True`, and gets them whole, as
    [B, F, 3, H, W]. Any other gets frames of them as images, each with its video's prompt. A reward
    for a generator of other samples gets what that one decodes, [B, ...].
    """

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """Scores [B] float32, all finite.

        `images` is [B, 3, H, W] float in [0, 1]; `prompts` and `metadata` have one entry per
        image. KeyError if a prompt's metadata lacks what the reward needs.
        """
        ...
