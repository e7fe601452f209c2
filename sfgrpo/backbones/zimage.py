"""Z-Image and Z-Image-Turbo.

The network's clock runs the other way (1 - t) and it predicts data minus noise. Its pipeline's
guidance_scale g, 0 for none, means `v_c + g (v_c - v_u)`: `sample.guidance_scale` is 1 + g here.
Prompts enter at their own lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor, nn

from sfgrpo.backbones._packed import PackedBackbone
from sfgrpo.backbones.base import Conditioning


class ZImageBackbone(PackedBackbone):
    """A ZImagePipeline, without its normalisation and truncation of guidance (off by default)."""

    pipeline_classes = (ZImagePipeline,)
    lora_targets = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    default_length = 512
    masks_text = True

    @property
    def channels(self) -> int:
        return self.pipeline.transformer.in_channels  # this network packs by itself

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        # In float32, as the stock pipeline has them: the last bit of a time shows in the velocity.
        sigmas = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float32, device="cpu")
        return {**super()._schedule(num_steps, latent_shape), "sigmas": sigmas.tolist()}

    def _encode(self, prompts: list[str]) -> Conditioning:
        found, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning.cat([Conditioning(tokens=tokens[None]) for tokens in found])

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        clock = (1000 - 1000 * t) / 1000  # 1 - t, rounded as the stock pipeline rounds it
        (found,) = transformer(
            list(x.to(self.dtype)[:, :, None].unbind()), clock, cond.unpadded(), return_dict=False
        )
        return -torch.stack(found).squeeze(2).float()

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.cap_feat_dim, dtype=self.dtype)
        )


load = ZImageBackbone.load
