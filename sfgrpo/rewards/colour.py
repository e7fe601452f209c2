"""How close digit and background are to the prompted colours, and which colours there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfgrpo.rewards.base import Metadata, expect_images

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "yellow": (250, 220, 40),
    "orange": (250, 140, 30),
    "pink": (250, 160, 190),
    "light blue": (120, 200, 250),
    "red": (210, 40, 40),
    "black": (15, 15, 15),
    "dark green": (10, 80, 40),
    "dark blue": (20, 30, 110),
    "purple": (90, 25, 110),
}
"""Colour words and their sRGB values (0 to 255)."""


def colour(name: str) -> Tensor:
    """sRGB value of a colour word, [3] float32 in [0, 1]. KeyError names the known words."""
    if name not in COLOURS:
        raise KeyError(f"unknown colour {name!r}; known: {', '.join(COLOURS)}")
    return torch.tensor(COLOURS[name], dtype=torch.float32, device="cpu") / 255


class ColourReward:
    """Score in [0, 1] of the prompted background and foreground colours.

    With b and f the prompted colours, every pixel p is explained as b + a (f - b), 0 <= a <= 1,
    plus a residual: what neither colour, nor an anti-aliased edge between them, accounts for. The
    score is the mean of exp(-residual / scale) over the image, times the share of the outermost
    pixels that is background, times how much foreground there is, up to what a digit needs. So
    neither a plain field nor exchanged colours score.
    """

    def __init__(self, *, scale: float, least_share: float) -> None:
        if scale <= 0 or not 0 < least_share < 1:
            raise ValueError(
                f"need scale > 0 and 0 < least_share < 1, got {scale} and {least_share}"
            )
        self._scale = scale
        self._least_share = least_share

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if not metadata:
            return images.new_empty(0, dtype=torch.float32)
        expect_images(images)
        pixels = images.detach().float().cpu().flatten(2)
        front, back = (
            torch.stack([_asked(entry, key) for entry in metadata])[:, :, None]
            for key in ("foreground", "background")
        )
        axis = front - back
        share = ((pixels - back) * axis).sum(1) / axis.square().sum(1).clamp_min(1e-6)
        share = share.clamp(0, 1)
        residual = (pixels - back - share[:, None] * axis).norm(dim=1)
        explained = torch.exp(-residual / self._scale)
        background = (explained * (1 - share))[:, _edge(images)].mean(1)
        foreground = (explained * share).mean(1) / self._least_share
        return explained.mean(1) * background * foreground.clamp(max=1)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError for metadata without two colours that are known."""
        for entry in metadata:
            for key in ("foreground", "background"):
                _asked(entry, key)


def _asked(entry: Metadata, key: str) -> Tensor:
    if key not in entry:
        raise KeyError(f"no metadata '{key}', a colour word")
    return colour(entry[key])


def _edge(images: Tensor) -> Tensor:
    """Which of the H W pixels are outermost, [H W] bool."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool, device="cpu")
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def build(*, scale: float = 0.25, least_share: float = 0.05) -> ColourReward:
    """The colour reward.

    `scale`: sRGB distance (0 to 1 per channel) at which a pixel's score falls to 1/e;
    `least_share`: the part of the image the foreground must fill for the full score. The thinnest
    real digits fill about a tenth.
    """
    return ColourReward(scale=scale, least_share=least_share)
