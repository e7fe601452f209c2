"""AuraFlow, and others of its classes (Pony V7)."""

from __future__ import annotations

from math import isqrt

import torch
from diffusers.pipelines.aura_flow.pipeline_aura_flow import AuraFlowPipeline
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning


class AuraFlowBackbone(PipelineBackbone):
    """An AuraFlowPipeline."""

    pipeline_classes = (AuraFlowPipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.linear_1", "ff.linear_2", "ff.out_projection",
        "ff_context.linear_1", "ff_context.linear_2", "ff_context.out_projection",
    )  # fmt: skip
    default_length = 256
    """UMT5 tokens; the network was trained with so many, zeros after the prompt."""

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        config, scale = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        multiple = scale * config.patch_size
        h, w = self._spatial(height, width, frames, scale=scale, multiple=multiple)
        largest = isqrt(config.pos_embed_max_size) * multiple
        if max(height, width) > largest:
            raise ValueError(
                f"height and width must be at most {largest} pixels, got {height} x {width}"
            )
        return config.in_channels, h, w

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype), encoder_hidden_states=cond.tokens, timestep=t,
            return_dict=False,
        )  # fmt: skip
        return velocity.float()

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype)
        )


load = AuraFlowBackbone.load
