"""Lumina-Image 2.0, and others of its classes.

The network's clock runs the other way (1 - t) and it predicts data minus noise. Guidance keeps the
norm of every row of pixels, as the stock pipeline's does by default. Prompts are read after an
instruction to the text encoder, negative ones without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline, calculate_shift
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import dynamic_shift
from sfgrpo.backbones.base import Conditioning, Negative


class Lumina2Backbone(PipelineBackbone):
    """A Lumina2Pipeline."""

    pipeline_classes = (Lumina2Pipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3",
    )  # fmt: skip
    default_length = 256
    """Gemma's tokens, those of the instruction among them."""
    masks_text = True

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self._of_patches(height, width, frames, patch=2)

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            # The stock pipeline counts channels where others count tokens.
            "mu": dynamic_shift(self.pipeline.scheduler, latent_shape[0], calculate_shift),
        }

    def _encode(self, prompts: list[str]) -> Conditioning:
        instruction = f"{self.pipeline.system_prompt} <Prompt Start> "
        # Below encode_prompt, which reads a negative prompt beside another one alone.
        tokens, mask = self.pipeline._get_gemma_prompt_embeds(
            [p if isinstance(p, Negative) else instruction + p for p in prompts],
            device=self.device, max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return Conditioning(tokens=tokens, mask=mask.bool())

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        clock = 1 - 1000 * t / 1000  # rounded as the stock pipeline rounds it
        (found,) = transformer(
            hidden_states=x.to(self.dtype),
            timestep=clock,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.token_mask(),
            return_dict=False,
        )
        return -found.float()

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        guided = torch.lerp(v_uncond, v, scale)
        wanted, found = (torch.linalg.vector_norm(u, dim=-1, keepdim=True) for u in (v, guided))
        return guided * (wanted / found), None

    def for_sizes(self) -> nn.Module:
        network: Any = self.transformer
        if not isinstance(network.rope_embedder, WholeCaptions):
            network.rope_embedder = WholeCaptions(network.rope_embedder)
        return network

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.cap_feat_dim, dtype=self.dtype)
        )


class WholeCaptions(nn.Module):
    """Rotary embeddings of captions without padding: the network's own ask a mask for its sums."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        """As Lumina2RotaryPosEmbed."""
        whole = torch.ones(attention_mask.shape, dtype=torch.int64, device="cpu")
        return self.rope(hidden_states, whole)


load = Lumina2Backbone.load
