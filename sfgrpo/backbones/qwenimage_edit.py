"""Qwen-Image-Edit: edits an image.

The text encoder sees the image before the prompt; the network sees its latents as tokens behind
those of the sample, told apart by the first of their three coordinates. Images are resized to a
megapixel of their own proportions (`model.image_resolution` for another size). Prompts are not cut:
`max_sequence_length` is how long the doctor takes them to be.

The text encoder's positions are those that the stock pipeline gives it. Under transformers 5 that
is a line, not the image's rows and columns, as long as diffusers does not say which tokens are an
image's (huggingface/diffusers#14194).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import (
    QwenImageEditPipeline,
    calculate_dimensions,
)
from torch import Tensor

from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.qwenimage import QwenImageBackbone, Shape, shape_of

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = 1024 * 1024
"""Pixels that an image is resized to."""
PATCH = 28
"""Pixels of a side of what is one token to the text encoder."""


class QwenImageEditBackbone(ImagesBackbone, QwenImageBackbone):
    """A QwenImageEditPipeline."""

    pipeline_classes = (QwenImageEditPipeline,)
    encode_batch: ClassVar[int] = 1
    """As the images of a prompt are the text encoder's business, too."""

    @classmethod
    def prepared_size(cls, height: int, width: int) -> tuple[int, int]:
        wide, high, _ = calculate_dimensions(AREA, width / height)
        return high, wide

    def _shown(self, height: int, width: int) -> tuple[int, int]:
        """Sides of what the autoencoder sees of an image of this size."""
        return self._whole_tokens(self.image_resolution or self.prepared_size(height, width))

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        """Sides of what the text encoder sees of it: the same."""
        return self._shown(height, width)

    def _embedded_with(
        self, texts: list[str], images: Sequence[Sequence[Image]], size: tuple[int, int, int]
    ) -> Conditioning:
        return Conditioning.cat([
            replace(self._read(text, shown), extra=self._prepared(shown, size))
            for text, shown in zip(texts, images, strict=True)
        ])  # fmt: skip

    def _read(self, text: str, images: Sequence[Image]) -> Conditioning:
        """A prompt with its images, as the text encoder reads them."""
        resize = self.pipeline.image_processor.resize
        seen = [resize(image, *self._seen(image.height, image.width)) for image in images]
        tokens, _ = self.pipeline.encode_prompt(prompt=[text], image=seen, device=self.device)
        return Conditioning(tokens=tokens)

    def _prepared(self, images: Sequence[Image], size: tuple[int, int, int]) -> dict[str, Tensor]:
        preprocess = self.pipeline.image_processor.preprocess
        shown = (preprocess(image, *self._shown(image.height, image.width)) for image in images)
        return {f"image_{k}": self._latents(pixels) for k, pixels in enumerate(shown)}

    def _latents(self, pixels: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in [-1, 1], normalised as those of samples are."""
        video = pixels[:, :, None].to(self.device, self.pipeline.vae.dtype)
        return self.pipeline._encode_vae_image(video, None)[:, :, 0]

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, list[Shape]]:
        tokens, shapes = super()._tokens(x, cond)
        images = [cond.extra[f"image_{k}"] for k in range(len(cond.extra))]
        packed = torch.cat([tokens, *map(self._pack, images)], 1)
        return packed, [*shapes, *map(shape_of, images)]

    def _length(self) -> int:
        height, width = self._seen(1, 1)
        return super()._length() + round(height / PATCH) * round(width / PATCH)

    def prepare_blank(self) -> Tensor:
        return self._latents(torch.zeros(1, 3, *self._shown(1, 1)))

    def blank(self, prompts: int) -> Conditioning:
        """With one image for each prompt, a square."""
        scale = self.pipeline.vae_scale_factor
        sides = (side // scale for side in self._shown(1, 1))
        image = torch.zeros(prompts, self.channels, *sides, dtype=self.dtype)
        return replace(super().blank(prompts), extra={"image_0": image})


load = QwenImageEditBackbone.load
