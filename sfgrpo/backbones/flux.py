"""FLUX.1: dev (guidance-distilled: `sample.embedded_guidance`) and others of the same classes.

Latents are kept unpacked, [16, h, w]; the network sees them packed as tokens of 2 x 2 patches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from sfgrpo.backbones._packed import PackedBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning


class FluxBackbone(PackedBackbone):
    """A FluxPipeline."""

    pipeline_classes = (FluxPipeline,)
    lora_targets = (  # those of Flow-GRPO's FLUX training script
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    whole_sequences = ""
    default_length = 512
    """T5 tokens."""

    def _encode(self, prompts: list[str]) -> Conditioning:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=self.device,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, pooled=pooled)

    def _tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """What the network sees, [B, L, 64], the tokens of the latents `x` first; and where each of
        the L stands, [L, 3]."""
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        return self._pack(x), places(h, w, columns=3, device=x.device)

    def sequences(self, latent_shape: tuple[int, ...]) -> Mapping[str, int]:
        tokens = latent_shape[-1] * latent_shape[-2] // 4
        return {"tokens": tokens, "text tokens": self.max_sequence_length}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        tokens, where = self._tokens(x, cond)
        (packed,) = transformer(
            hidden_states=tokens,
            timestep=t,
            guidance=self._guidance_rows(t),
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.tokens,
            txt_ids=x.new_zeros(cond.tokens.shape[1], 3, dtype=torch.float32),
            img_ids=where,
            return_dict=False,
        )
        return self._unpack(packed[:, : x.shape[-2] * x.shape[-1] // 4], x)

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype),
            pooled=torch.zeros(prompts, config.pooled_projection_dim, dtype=self.dtype),
        )


load = FluxBackbone.load
