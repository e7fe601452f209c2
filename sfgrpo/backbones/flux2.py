"""FLUX.2: dev (guidance-distilled, Mistral 3 reads the prompt) and klein (Qwen 3 reads it).

Latents are those of the autoencoder in 2 x 2 patches, [128, h, w], one token a position, normalised
by the autoencoder's running statistics. klein's base models take classifier-free guidance
(`sample.guidance_scale`); its step-distilled ones take none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from einops import rearrange
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning


class Flux2Backbone(PipelineBackbone):
    """A Flux2Pipeline or Flux2KleinPipeline, without reference images; see `flux2_edit`."""

    pipeline_classes = (Flux2Pipeline, Flux2KleinPipeline)
    whole_sequences = ""
    default_length = 512

    def _prepare(self) -> None:
        super()._prepare()
        # By number: in the blocks of two streams "attn.to_out" is not a layer but a list of them.
        singles = range(self.pipeline.transformer.config.num_single_layers)
        self.lora_targets = (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "attn.to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles),
        )  # fmt: skip

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        scale = 2 * self.pipeline.vae_scale_factor
        h, w = self._spatial(height, width, frames, scale=scale, multiple=scale)
        return self.pipeline.transformer.config.in_channels, h, w

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        tokens = latent_shape[-1] * latent_shape[-2]
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps),
        }

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens)

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """What the network sees, [B, L, C], the tokens of the latents `x` first; and where each of
        the L stands, [L, 4]."""
        return self._flat(x), places(*x.shape[-2:], columns=4, device=x.device)

    def _flat(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens [B, h w, C] in the network's dtype."""
        return rearrange(x.to(self.dtype), "b c h w -> b (h w) c")

    def sequences(self, latent_shape: tuple[int, ...]) -> Mapping[str, int]:
        tokens = latent_shape[-1] * latent_shape[-2]
        return {"tokens": tokens, "text tokens": self.max_sequence_length}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        rows, _, h, w = x.shape
        text = x.new_zeros(cond.tokens.shape[1], 4, dtype=torch.float32)
        text[:, 3] = torch.arange(len(text), device=x.device)
        tokens, image = self._tokens(x, cond)
        (packed,) = transformer(
            hidden_states=tokens,
            timestep=t,
            guidance=self._guidance_rows(t),
            encoder_hidden_states=cond.tokens,
            txt_ids=text.expand(rows, -1, -1),
            img_ids=image.expand(rows, -1, -1),
            return_dict=False,
        )
        return rearrange(packed[:, : h * w], "b (h w) c -> b c h w", h=h).float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of the autoencoder's patches, [1, C, 1, 1] each."""
        bn, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        std = torch.sqrt(bn.running_var + eps)
        return bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        patches = rearrange(latents * std + mean, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
        return self.pipeline.vae.decode(patches, return_dict=False)[0]

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype)
        )


load = Flux2Backbone.load
