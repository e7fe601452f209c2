"""CogView4.

Prompts are embedded one by one, as the stock pipeline does with a single one: its language model
reads padding in front without a mask, so that among others a prompt would be read otherwise. The
network is told whole times of the schedule before its shift, so noise levels are taken back there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.cogview4.pipeline_cogview4 import CogView4Pipeline, calculate_shift
from einops import rearrange
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning

WHOLE = 16
"""Prompts are padded to multiples of so many tokens."""


class CogView4Backbone(PipelineBackbone):
    """A CogView4Pipeline."""

    pipeline_classes = (CogView4Pipeline,)
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
    )  # fmt: skip
    default_length = 1024
    """GLM's tokens."""
    encode_batch = 1
    masks_text = True

    def _prepare(self) -> None:
        super()._prepare()
        for block in self.pipeline.transformer.transformer_blocks:
            block.attn1.set_processor(MaskedAttention())

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        patch = self.pipeline.transformer.config.patch_size
        return self._of_patches(height, width, frames, patch=patch)

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        config = self.pipeline.scheduler.config
        whole = np.linspace(config.num_train_timesteps, 1.0, num_steps).astype(np.int64)
        times = whole.astype(np.float32)
        return {
            "timesteps": times,
            "sigmas": times / config.num_train_timesteps,
            "mu": self._mu(latent_shape),
        }

    def _mu(self, latent_shape: tuple[int, ...]) -> float:
        """What the schedule is shifted by, if it depends on the number of tokens."""
        config, patch = self.pipeline.scheduler.config, self.pipeline.transformer.config.patch_size
        tokens = latent_shape[-2] * latent_shape[-1] // patch**2
        names = ("base_image_seq_len", 256), ("base_shift", 0.25), ("max_shift", 0.75)
        return calculate_shift(tokens, *(config.get(*name) for name in names))

    def _times(self, t: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """The schedule's whole times before its shift, at noise levels [B]."""
        config = self.pipeline.scheduler.config
        factor = config.shift
        if config.use_dynamic_shifting:
            mu = self._mu(latent_shape)
            factor = mu if config.time_shift_type == "linear" else math.exp(mu)
        level = t.double()
        before = level / (level + factor * (1 - level))
        return (before * config.num_train_timesteps).round().float()

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        size, corner = (cond.tokens.new_zeros(len(x), 2) for _ in range(2))
        size[:, 0], size[:, 1] = x.shape[-2] * scale, x.shape[-1] * scale
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=cond.tokens,
            timestep=self._times(t, x.shape),
            original_size=size,
            target_size=size,
            crop_coords=corner,
            attention_mask=cond.mask,
            return_dict=False,
        )
        return velocity.float()

    def blank(self, prompts: int) -> Conditioning:
        length = math.ceil(self.max_sequence_length / WHOLE) * WHOLE
        width = self.pipeline.transformer.config.text_embed_dim
        return Conditioning(tokens=torch.zeros(prompts, length, width, dtype=self.dtype))


class MaskedAttention:
    """CogView4's attention by the chosen backend, which leaves out what a mask says: in diffusers'
    own, CogView4AttnProcessor, a mask of ones and zeros is added to the scores."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None, image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of image tokens [B, L, C] and the text's [B, M, C], of which stand those where
        `attention_mask`, bool [B, M], is True."""
        text, places = encoder_hidden_states.shape[1], hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (
            rearrange(layer(both), "b l (h d) -> b l h d", h=attn.heads)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = (
            _turned(part if norm is None else norm(part).to(v.dtype), text, image_rotary_emb)
            for part, norm in ((q, attn.norm_q), (k, attn.norm_k))
        )
        mask = attention_mask
        if mask is not None:
            mask = F.pad(mask, (0, places), value=True)[:, None, None]
        found: Any = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        joint = attn.to_out[1](attn.to_out[0](found.flatten(2).to(q.dtype)))
        return joint[:, text:], joint[:, :text]


def _turned(x: Tensor, text: int, angles: Any) -> Tensor:
    """Queries or keys [B, L, H, D], those after the first `text` turned by rotary embeddings."""
    image: Any = apply_rotary_emb(x[:, text:], angles, use_real_unbind_dim=-2, sequence_dim=1)
    return torch.cat([x[:, :text], image], 1)


load = CogView4Backbone.load
