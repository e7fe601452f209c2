"""SANA.

Published folders come with DPM-Solver, a multistep solver; ours are Euler steps on a schedule with
the same `flow_shift`. Sizes are taken as they are, where the stock pipeline by default makes the
nearest of its list and cuts. Prompts are read after an instruction to the text encoder, negative
ones without it.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from torch import Tensor, nn

from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning, Negative


def instruction_of(made: type[DiffusionPipeline]) -> list[str]:
    """What a stock pipeline lets its text encoder read before a prompt."""
    call: Any = made.__call__
    return inspect.signature(call).parameters["complex_human_instruction"].default


class SanaBackbone(PipelineBackbone):
    """A SanaPipeline."""

    pipeline_classes = (SanaPipeline,)
    instruction: ClassVar[list[str]] = instruction_of(SanaPipeline)
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    )  # fmt: skip
    default_length = 300
    """Gemma's tokens, without those of the instruction."""
    masks_text = True

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        patch = self.pipeline.transformer.config.patch_size
        return self._of_patches(height, width, frames, patch=patch)

    def _encode(self, prompts: list[str]) -> Conditioning:
        negative = [isinstance(prompt, Negative) for prompt in prompts]
        places = sorted(range(len(prompts)), key=negative.__getitem__)
        first = negative.count(False)
        found = [
            self._read([prompts[place] for place in part], instruction)
            for part, instruction in ((places[:first], self.instruction), (places[first:], None))
            if part
        ]
        back = torch.tensor(places, device=self.device).argsort()
        return Conditioning.cat(found).rows(back)

    def _read(self, prompts: list[str], instruction: list[str] | None) -> Conditioning:
        tokens, mask, *_ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, complex_human_instruction=instruction,
        )  # fmt: skip
        return Conditioning(tokens=tokens, mask=mask.bool())

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        times = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        (found,) = transformer(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.token_mask(),
            timestep=times * self.pipeline.transformer.config.get("timestep_scale", 1.0),
            return_dict=False,
        )
        return found[:, : x.shape[1]].float()  # some networks predict a variance, too

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]

    def tokens_read(self, encoder: Any) -> int:
        """With the instruction, of which a word is at least a token: configurations alone do not
        say more."""
        return self.max_sequence_length + len(" ".join(self.instruction).split())

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.caption_channels, dtype=self.dtype)
        )


load = SanaBackbone.load
