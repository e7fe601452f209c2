"""What image processors do, on tensors and their own device.

A processor opens files and works on bytes; images to be rewarded are tensors already. Here resizing
is PyTorch's with antialiasing, which is Pillow's filter without its rounding to 8 bits after each
direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.prompts import images
from sfgrpo.rewards.base import expect_images

BICUBIC = 3
"""Pillow's number of the filter."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """[B, 3, H, W] -> [B, 3, *size] fp32, bicubic with antialiasing; may leave [0, 1]."""
    return F.interpolate(
        images.float(), size=list(size), mode="bicubic", antialias=True, align_corners=False
    )


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std in each channel."""
    centre, spread = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - centre) / spread


def to_bytes(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3] on the CPU: what a PNG of each would hold."""
    expect_images(images)
    whole = (images.detach().float().clamp(0, 1) * 255).round().byte()
    return whole.permute(0, 2, 3, 1).cpu().numpy()


def open_image(source: str) -> Tensor:
    """An image of a prompt as [3, H, W] fp32 in [0, 1], upright, as generators get it; OSError if
    there is none, or it is no image."""
    array = np.array(images.opened(source))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What CLIP's processor does with an image: resize, cut the centre, normalise."""

    shortest: int
    """Pixels of the shorter side after resizing."""
    crop: tuple[int, int]
    """Height and width of the cut out centre."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounds: bool = False
    """Whether half a pixel of an odd margin goes to the even side, as in torchvision, instead of
    up and left, as in transformers."""

    @classmethod
    def of(cls, processor: Any, source: str) -> Preprocess:
        """The settings of an image processor; ValueError for steps other than CLIP's."""
        size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
        shortest = size.get("shortest_edge")
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        off = [step for step in steps if not getattr(processor, step, False)]
        if off or not shortest or "height" not in crop or processor.resample != BICUBIC:
            raise ValueError(
                f"'{source}' prepares images otherwise than CLIP (size {processor.size}, resample "
                f"{processor.resample}, switched off: {off})"
            )
        return cls(
            shortest=shortest, crop=(crop["height"], crop["width"]),
            mean=tuple(processor.image_mean), std=tuple(processor.image_std),
        )  # fmt: skip

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, *crop], normalised; of any floating type, computed in
        fp32."""
        expect_images(images)
        height, width = images.shape[-2:]
        short = min(height, width)
        size = [self.shortest * side // short for side in (height, width)]
        margins = [s - c for s, c in zip(size, self.crop, strict=True)]
        if min(margins) < 0:
            raise ValueError(f"cannot cut {self.crop} out of {tuple(size)}")
        top, left = (round(m / 2) if self.rounds else m // 2 for m in margins)
        cut = resize(images, size)[..., top : top + self.crop[0], left : left + self.crop[1]]
        return normalise(cut.clamp(0, 1), self.mean, self.std)
