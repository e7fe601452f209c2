"""FLUX.1 Kontext: edits an image.

The network sees the image's latents as tokens behind those of the sample, told apart by the first
of their three coordinates. Images are resized to that of the sizes it was trained on which has the
nearest proportions (`model.image_resolution` for another).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import (
    PREFERRED_KONTEXT_RESOLUTIONS,
    FluxKontextPipeline,
)
from torch import Tensor

from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.flux import FluxBackbone

if TYPE_CHECKING:
    from PIL.Image import Image


class FluxKontextBackbone(ImagesBackbone, FluxBackbone):
    """A FluxKontextPipeline."""

    pipeline_classes = (FluxKontextPipeline,)

    @classmethod
    def prepared_size(cls, height: int, width: int) -> tuple[int, int]:
        ratio = width / height
        _, wide, high = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return high, wide

    def _prepared(self, images: Sequence[Image], size: tuple[int, int, int]) -> dict[str, Tensor]:
        (image,), processor = images, self.pipeline.image_processor
        height, width = self._whole_tokens(self._sides(image))
        pixels = processor.preprocess(processor.resize(image, height, width), height, width)
        return {"image": self._latents(pixels)}

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        (tokens, here), image = super()._tokens(x, cond), cond.extra["image"]
        h, w = image.shape[-2] // 2, image.shape[-1] // 2
        there = places(h, w, columns=3, device=x.device)
        there[:, 0] = 1
        return torch.cat([tokens, self._pack(image)], 1), torch.cat([here, there])

    def prepare_blank(self) -> Tensor:
        height, width = self._whole_tokens(self.image_resolution or self.prepared_size(1, 1))
        return self._latents(torch.zeros(1, 3, height, width))

    def blank(self, prompts: int) -> Conditioning:
        scale = self.pipeline.vae_scale_factor
        height, width = self._whole_tokens(self.image_resolution or self.prepared_size(1, 1))
        shape = prompts, self.channels, height // scale, width // scale
        return replace(
            super().blank(prompts), extra={"image": torch.zeros(shape, dtype=self.dtype)}
        )


load = FluxKontextBackbone.load
