"""Wan 2.1 and 2.2, image to video.

Of the 14B networks the latents of the first frame, and a mask that says where it is, are further
channels; Wan 2.1's also reads CLIP's embedding of the image. TI2V-5B has the frame among the
latents, at time 0: its velocity there is what leads straight to the frame, so that samples and
clean estimates end on it, and nothing of it is trained. Images are resized to the video's size.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from torch import Tensor, nn
from typing_extensions import Self

from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.wan import WanBackbone

if TYPE_CHECKING:
    from PIL.Image import Image


class WanI2VBackbone(ImagesBackbone, WanBackbone):
    """A WanImageToVideoPipeline; also the folder of TI2V-5B, which names a WanPipeline."""

    pipeline_classes = (WanImageToVideoPipeline,)
    whole_sequences = ""
    reads_as: ClassVar[Mapping[str, Any]] = {"WanPipeline": WanImageToVideoPipeline}
    left_out: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "absent": ("text_encoder", "image_encoder"), "only": ("transformer",),
    }  # fmt: skip

    @classmethod
    def load(
        cls, path: str | Path, *, image_resolution: tuple[int, int] | None = None, **options: Any
    ) -> Self:
        """As every family's, but that images have the video's size."""
        if image_resolution is not None:
            raise ValueError(
                "model.image_resolution: an image that starts a video has its size; use null"
            )
        # The stock pipeline cleans prompts with it, and fails where it is missing.
        importlib.import_module("ftfy")
        return super().load(path, **options)

    @classmethod
    def prepared_size(cls, height: int, width: int) -> None:
        return None

    def _prepare(self) -> None:
        super()._prepare()
        if not self.expands_times and self.pipeline.transformer.config.in_channels == self.channels:
            raise ValueError("model.path: this network starts from no image; use backbone 'wan'")

    @property
    def channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def _prepared(self, images: Sequence[Image], size: tuple[int, int, int]) -> dict[str, Tensor]:
        (image,), (height, width, frames) = images, size
        pixels = self.pipeline.video_processor.preprocess(image, height=height, width=width)
        found = {"start": self._start(pixels.to(self.device, self.pipeline.vae.dtype), frames)}
        if self.pipeline.image_encoder is not None:
            found["seen"] = self.pipeline.encode_image(image, self.device)
        return found

    def _start(self, pixels: Tensor, frames: int) -> Tensor:
        """What the network reads of an image [1, 3, H, W] in [-1, 1] that starts a video."""
        video = pixels[:, :, None]
        if not self.expands_times:
            rest = video.new_zeros(*video.shape[:2], frames - 1, *video.shape[3:])
            video = torch.cat([video, rest], 2)
        vae = self.pipeline.vae
        found = vae.encode(video).latent_dist.mode()
        mean, std = (
            found.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = (found - mean) * (1.0 / std)
        if self.expands_times:
            return latents
        mask = latents.new_zeros(1, self.pipeline.vae_scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        start, times = cond.extra["start"], self._times(t)
        if self.expands_times:
            tokens = self._tokens(x)
            per_token = times[:, None].repeat(1, tokens)
            per_token[:, : tokens // x.shape[2]] = 0
            times, seen = per_token, torch.cat([start, x[:, :, 1:].to(self.dtype)], 2)
        else:
            seen = torch.cat([x.to(self.dtype), start], 1)
        (found,) = transformer(
            hidden_states=seen, timestep=times, encoder_hidden_states=cond.tokens,
            encoder_hidden_states_image=cond.extra.get("seen"), return_dict=False,
        )  # fmt: skip
        if not self.expands_times:
            return found.float()
        to_start = (x[:, :, :1] - start) / t.float().view(-1, 1, 1, 1, 1)
        return torch.cat([to_start, found[:, :, 1:].float()], 2)

    def prepare_blank(self) -> Tensor:
        height, width, frames = self.sample_size
        return self._start(torch.zeros(1, 3, height, width), frames)

    def blank(self, prompts: int) -> Conditioning:
        _, *rest = self.latent_shape(*self.sample_size)
        config, every = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_temporal
        channels = self.channels + every
        if self.expands_times:
            channels, rest[0] = self.channels, 1
        extra = {"start": torch.zeros(prompts, channels, *rest, dtype=self.dtype)}
        if config.image_dim is not None:
            vision = self.pipeline.image_encoder.config
            tokens = (vision.image_size // vision.patch_size) ** 2 + 1
            extra["seen"] = torch.zeros(prompts, tokens, config.image_dim, dtype=self.dtype)
        return replace(super().blank(prompts), extra=extra)


load = WanI2VBackbone.load
