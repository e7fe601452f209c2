"""How well images compress: the compressibility and incompressibility rewards of DDPO (Black et al.
2023, arXiv 2305.13301).

The size, in kilobytes (1000 bytes), of each image [B, 3, H, W] in [0, 1] as a JPEG of quality 95,
as Pillow writes it from the nearest 8-bit values; negative for compressibility. Flow-GRPO divides
the latter by 500, which is a weight of 0.002 here. No network, no prompt; on the CPU.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from sfgrpo.rewards._pixels import to_bytes
from sfgrpo.rewards.base import Metadata

SIGNS = {"compressibility": -1, "incompressibility": 1}
KILOBYTE = 1000


class JpegReward:
    """Kilobytes of the image as a JPEG, or less than none."""

    def __init__(self, *, sign: int, quality: int) -> None:
        self._sign = sign
        self._quality = quality

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        sizes = [self._size(Image.fromarray(image)) for image in to_bytes(images)]
        return self._sign * torch.tensor(sizes, dtype=torch.float32, device="cpu")

    def _size(self, image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self._quality)
        return buffer.tell() / KILOBYTE


def build(
    *,
    goal: Literal["compressibility", "incompressibility"] = "compressibility",
    quality: int = 95,
) -> JpegReward:
    """The JPEG reward.

    Args:
        goal: whether small or large files score higher.
        quality: JPEG's, 1 to 95.

    Raises:
        ValueError: values that make no sense, naming them.
    """
    if goal not in SIGNS:
        raise ValueError(f"reward 'jpeg': goal must be one of {list(SIGNS)}, got {goal!r}")
    if not 1 <= quality <= 95:
        raise ValueError(f"reward 'jpeg': quality must be from 1 to 95, got {quality}")
    return JpegReward(sign=SIGNS[goal], quality=quality)
