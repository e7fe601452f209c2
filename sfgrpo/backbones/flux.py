"""FLUX.1: dev (guidance-distilled: `sample.embedded_guidance`) and others of the same classes.

Latents are kept unpacked, [16, h, w]; the network sees them packed as tokens of 2 x 2 patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from einops import rearrange
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import PACK, UNPACK, dynamic_shift, places
from sfgrpo.backbones.base import Conditioning


class FluxBackbone(PipelineBackbone):
    """A FluxPipeline."""

    pipeline_classes = (FluxPipeline,)
    lora_targets = (  # those of Flow-GRPO's FLUX training script
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    default_length = 512
    """T5 tokens."""

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        h, w = self._spatial(height, width, frames, scale=scale, multiple=2 * scale)
        return self.pipeline.transformer.config.in_channels // 4, h, w

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        tokens = latent_shape[-1] * latent_shape[-2] // 4
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": dynamic_shift(self.pipeline.scheduler, tokens, calculate_shift),
        }

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=self.device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, pooled=pooled)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        (packed,) = transformer(
            hidden_states=rearrange(x.to(self.dtype), PACK, p=2, q=2),
            timestep=t,
            guidance=self._guidance_rows(t),
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.tokens,
            txt_ids=torch.zeros(cond.tokens.shape[1], 3, device=x.device),
            img_ids=places(h, w, columns=3, device=x.device),
            return_dict=False,
        )
        return rearrange(packed, UNPACK, h=h, p=2, q=2).float()

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype),
            pooled=torch.zeros(prompts, config.pooled_projection_dim, dtype=self.dtype),
        )


load = FluxBackbone.load
