"""Pipelines whose prompts bring images: what is to be edited, where a video starts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from sfgrpo.backbones._loading import LEFT_OUT
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning

if TYPE_CHECKING:
    from PIL.Image import Image


class ImagesBackbone(PipelineBackbone):
    """The part of a family that prepares images; another base class prepares the rest."""

    takes_images = range(1, 2)
    whole_sequences = "its images are tokens, too, as many as each prompt's turn out to be"
    left_out: ClassVar[Mapping[str, tuple[str, ...]]] = {**LEFT_OUT, "only": ("transformer",)}
    image_resolution: tuple[int, int] | None = None
    """(height, width) that images are resized to; None is what the stock pipeline does."""
    sample_size: tuple[int, int, int] = 0, 0, 0
    """(height, width, frames) of the samples that blank conditioning is for."""

    @classmethod
    def load(
        cls, path: str | Path, *, image_resolution: tuple[int, int] | None = None, **options: Any
    ) -> Self:
        """As every family's.

        Args:
            image_resolution: (height, width) in pixels that prompts' images are resized to,
                whatever their proportions; None is what the stock pipeline does.
        """
        self = super().load(path, **options)
        self.image_resolution = image_resolution
        return self

    @classmethod
    @abstractmethod
    def prepared_size(cls, height: int, width: int) -> tuple[int, int] | None:
        """(height, width) to which the stock pipeline resizes an image of this size; None where it
        is that of the samples. ValueError for one that it does not take."""

    @torch.no_grad()
    def encode_with_images(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]], size: tuple[int, int, int]
    ) -> Conditioning:
        """See `sfgrpo.backbones.base.ImageBackbone`."""
        texts = list(prompts)
        with self._encoders_at_hand(), self._watch.over(texts):
            found = self._embedded_with(texts, images, size)
        return found.to(self.device, self.dtype)

    def _embedded_with(
        self, texts: list[str], images: Sequence[Sequence[Image]], size: tuple[int, int, int]
    ) -> Conditioning:
        """Here the images are none of the text encoders' business."""
        found = self._embedded(texts)
        rows = torch.arange(len(texts), device=found.tokens.device).split(1)
        return Conditioning.cat([
            replace(found.rows(row), extra=self._prepared(shown, size))
            for row, shown in zip(rows, images, strict=True)
        ])  # fmt: skip

    @abstractmethod
    def _prepared(self, images: Sequence[Image], size: tuple[int, int, int]) -> dict[str, Tensor]:
        """What the network reads of one prompt's images, each tensor [1, ...], for samples of
        `size` (height, width, frames)."""

    def _sides(self, image: Image) -> tuple[int, int]:
        """(height, width) to which an image is resized."""
        sides = self.image_resolution or self.prepared_size(image.height, image.width)
        assert sides is not None
        return sides

    def _whole_tokens(self, sides: tuple[int, int]) -> tuple[int, int]:
        """The sides in pixels without what is no whole token, 2 x 2 places of a latent."""
        multiple = 2 * self.pipeline.vae_scale_factor
        height, width = (side // multiple * multiple for side in sides)
        return height, width

    def _latents(self, pixels: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W] in [-1, 1], the mode of an AutoencoderKL's."""
        vae = self.pipeline.vae
        found = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return (found - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
