"""Pipelines whose network sees a latent as tokens of 2 x 2 patches, and whose schedule follows
their number: FLUX.1, Chroma, Qwen-Image, Z-Image."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from einops import rearrange
from torch import Tensor

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import PACK, UNPACK, dynamic_shift


class PackedBackbone(PipelineBackbone):
    """Latents are kept unpacked, [C, h, w], and packed within `velocity`."""

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.pipeline.transformer.config.in_channels // 4

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        h, w = self._spatial(height, width, frames, scale=scale, multiple=2 * scale)
        return self.channels, h, w

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        tokens = latent_shape[-1] * latent_shape[-2] // 4
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            # Every pipeline has a copy of this function.
            "mu": dynamic_shift(self.pipeline.scheduler, tokens, calculate_shift),
        }

    def _pack(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens [B, h w / 4, 4 C] in the network's dtype."""
        return rearrange(x.to(self.dtype), PACK, p=2, q=2)

    def _unpack(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens -> fp32 of the shape of the latents `x`."""
        return rearrange(tokens, UNPACK, h=x.shape[-2] // 2, p=2, q=2).float()
