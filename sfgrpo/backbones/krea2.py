"""Krea 2, Raw and Turbo.

Of every text token the network reads the states of several layers of the language model, here side
by side in one vector. The stock pipeline pads prompts between their words and the end of the chat's
turn; the network gives text no places, so that padding is left out and costs nothing. Guidance is
counted from 1 here and from 0 there.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.krea2.pipeline_krea2 import Krea2Pipeline
from torch import Tensor, nn

from sfgrpo.backbones._packed import PackedBackbone
from sfgrpo.backbones._tokens import places
from sfgrpo.backbones.base import Conditioning

DISTILLED_SHIFT = 1.15
"""The `mu` that Turbo's schedule is shifted by, at any size."""


class Krea2Backbone(PackedBackbone):
    """A Krea2Pipeline."""

    pipeline_classes = (Krea2Pipeline,)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0",
        "ff.gate", "ff.up", "ff.down",
    )  # fmt: skip
    default_length = 512
    masks_text = True

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        found = super()._schedule(num_steps, latent_shape)
        if self.pipeline.config.is_distilled and found["mu"] is not None:
            found["mu"] = DISTILLED_SHIFT
        return found

    def _encode(self, prompts: list[str]) -> Conditioning:
        states, mask = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        longest = int(mask.sum(1).max())
        order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        return Conditioning(tokens=states[rows, order].flatten(2), mask=mask[rows, order])

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        config, text = self.pipeline.transformer.config, cond.tokens.shape[1]
        image = places(x.shape[-2] // 2, x.shape[-1] // 2, columns=3, device=x.device)
        (packed,) = transformer(
            hidden_states=self._pack(x),
            encoder_hidden_states=cond.tokens.unflatten(2, (config.num_text_layers, -1)),
            timestep=t,
            position_ids=torch.cat([image.new_zeros(text, 3), image]),
            encoder_attention_mask=cond.mask,
            return_dict=False,
        )
        return self._unpack(packed, x)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._one_frame(latents)

    def tokens_read(self, encoder: Any) -> int:
        """With the instruction before the prompt, whose states the pipeline cuts off."""
        return self.max_sequence_length + self.pipeline.prompt_template_encode_start_idx

    def blank(self, prompts: int) -> Conditioning:
        config = self.pipeline.transformer.config
        width = config.num_text_layers * config.text_hidden_dim
        tokens = torch.zeros(prompts, self.max_sequence_length, width, dtype=self.dtype)
        return Conditioning(tokens=tokens)


load = Krea2Backbone.load
