"""LTX-Video, text to video, at its pipeline's 25 frames a second.

Latents are kept unpacked, [128, F, h, w]; the network sees one token a position. Decoders that read
a time are told 0, as by the stock pipeline unless it is told otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline, calculate_shift
from einops import rearrange
from torch import Tensor, nn

from sfgrpo.backbones._tokens import dynamic_shift
from sfgrpo.backbones._video import VideoBackbone
from sfgrpo.backbones.base import Conditioning

FRAME_RATE = 25
"""Frames a second, the stock pipeline's default; the network's rotary embeddings are of seconds."""


class LTXBackbone(VideoBackbone):
    """An LTXPipeline."""

    pipeline_classes = (LTXPipeline,)
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2",
    )  # fmt: skip
    default_length = 128
    """T5 tokens."""
    masks_text = True
    whole_sequences = (
        "diffusers' plan divides its cross-attention, too, which has no backward where text and "
        "video are of other lengths"
    )

    def _strides(self) -> tuple[int, int]:
        pipeline = self.pipeline
        return pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        tokens = torch.Size(latent_shape[1:]).numel()
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": dynamic_shift(self.pipeline.scheduler, tokens, calculate_shift),
        }

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, mask, *_ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, mask=mask)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        frames, h, w = x.shape[2:]
        every, scale = self._strides()
        (tokens,) = transformer(
            hidden_states=rearrange(x.to(self.dtype), "b c f h w -> b (f h w) c"),
            encoder_hidden_states=cond.tokens,
            timestep=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_attention_mask=cond.token_mask(),
            num_frames=frames,
            height=h,
            width=w,
            rope_interpolation_scale=(every / FRAME_RATE, scale, scale),
            return_dict=False,
        )
        return rearrange(tokens, "b (f h w) c -> b c f h w", f=frames, h=h).float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (x.to(latents).view(-1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        unscaled = latents * std / vae.config.scaling_factor + mean
        return vae.decode(unscaled, time, return_dict=False)[0].transpose(1, 2)

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.caption_channels, dtype=self.dtype)
        )


load = LTXBackbone.load
