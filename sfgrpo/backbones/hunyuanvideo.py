"""HunyuanVideo, text to video; guidance-distilled (`sample.embedded_guidance`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import (
    DEFAULT_PROMPT_TEMPLATE,
    HunyuanVideoPipeline,
)
from torch import Tensor, nn

from sfgrpo.backbones._video import VideoBackbone
from sfgrpo.backbones.base import Conditioning


class HunyuanVideoBackbone(VideoBackbone):
    """A HunyuanVideoPipeline."""

    pipeline_classes = (HunyuanVideoPipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    default_length = 256
    """LLaMA's tokens."""
    masks_text = True

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, pooled, mask = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(tokens=tokens, pooled=pooled, mask=mask.bool())

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        told = self._guidance_rows(t)
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype),
            timestep=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.token_mask().to(self.dtype),
            pooled_projections=cond.pooled,
            guidance=None if told is None else told.to(self.dtype) * 1000,
            return_dict=False,
        )
        return velocity.float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        videos = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return videos.transpose(1, 2)

    def tokens_read(self, encoder: Any) -> int:
        """LLaMA's with the instruction, which the pipeline puts before the prompt and cuts off."""
        is_llama = encoder is self.pipeline.text_encoder
        instruction = DEFAULT_PROMPT_TEMPLATE["crop_start"] if is_llama else 0
        return super().tokens_read(encoder) + instruction

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.text_embed_dim, dtype=self.dtype),
            pooled=torch.zeros(prompts, config.pooled_projection_dim, dtype=self.dtype),
        )


load = HunyuanVideoBackbone.load
