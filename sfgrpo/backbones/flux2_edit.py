"""FLUX.2 with reference images: dev and klein, from one image to ten.

The network sees each image's latents as tokens behind those of the sample, told apart by the first
of their four coordinates: 10, 20, ... Images of more than a megapixel are made smaller, and sides
are cut to whole tokens (`model.image_resolution` resizes them instead).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from PIL.Image import Resampling
from torch import Tensor

from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.flux2 import Flux2Backbone

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 1024 * 1024
"""Pixels of an image that is taken as it is."""
SMALLEST, LONGEST = 64, 8
"""Pixels of a side at least, and how many times as long the other is at most."""
APART = 10
"""Of two images, in the first coordinate."""


class Flux2EditBackbone(ImagesBackbone, Flux2Backbone):
    """A Flux2Pipeline or Flux2KleinPipeline, with reference images."""

    takes_images = range(1, 11)

    @classmethod
    def prepared_size(cls, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < SMALLEST or max(height, width) > LONGEST * min(height, width):
            raise ValueError(
                f"FLUX.2 takes images of at least {SMALLEST} pixels a side whose sides differ by "
                f"{LONGEST} times at most, not {height} x {width}"
            )
        if height * width <= LARGEST:
            return height, width
        scale = math.sqrt(LARGEST / (width * height))
        return int(height * scale), int(width * scale)

    def _prepared(self, images: Sequence[Image], size: tuple[int, int, int]) -> dict[str, Tensor]:
        return {f"image_{k}": self._latents(self._pixels(image)) for k, image in enumerate(images)}

    def _pixels(self, image: Image) -> Tensor:
        height, width = self._sides(image)
        if (width, height) != image.size:
            image = image.resize((width, height), Resampling.LANCZOS)
        height, width = self._whole_tokens((height, width))
        return self.pipeline.image_processor.preprocess(
            image, height=height, width=width, resize_mode="crop"
        )

    def _latents(self, pixels: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [-1, 1], normalised as those of samples are."""
        vae, (mean, std) = self.pipeline.vae, self._statistics()
        found = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return (rearrange(found, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2) - mean) / std

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        tokens, here = super()._tokens(x, cond)
        seen, where = [tokens], [here]
        for k in range(len(cond.extra)):
            image = cond.extra[f"image_{k}"]
            there = places(*image.shape[-2:], columns=4, device=x.device)
            there[:, 0] = APART * (k + 1)
            seen.append(self._flat(image))
            where.append(there)
        return torch.cat(seen, 1), torch.cat(where)

    def prepare_blank(self) -> Tensor:
        height, width = self._whole_tokens(self.image_resolution or (1024, 1024))
        return self._latents(torch.zeros(1, 3, height, width))

    def blank(self, prompts: int) -> Conditioning:
        """With one image for each prompt."""
        scale = 2 * self.pipeline.vae_scale_factor
        channels = self.pipeline.transformer.config.in_channels
        height, width = (side // scale for side in self.image_resolution or (1024, 1024))
        image = torch.zeros(prompts, channels, height, width, dtype=self.dtype)
        return replace(super().blank(prompts), extra={"image_0": image})


load = Flux2EditBackbone.load
