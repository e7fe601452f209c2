"""Stable Diffusion 3 and 3.5, and any pipeline folder of the same classes (the embedded models)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
    calculate_shift,
)
from torch import Tensor, nn
from typing_extensions import Self

from sfgrpo import backbones
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones._tokens import dynamic_shift
from sfgrpo.backbones.base import Conditioning


class SD3Backbone(PipelineBackbone):
    """A StableDiffusion3Pipeline."""

    pipeline_classes = (StableDiffusion3Pipeline,)
    lora_targets = (  # those of Flow-GRPO's SD3 training script (arXiv 2505.05470)
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
    )  # fmt: skip
    default_length = 256
    """T5 tokens; a pipeline without T5 pads that many zeros, so a model that was never trained with
    them wants 0."""

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """As every family's, the decoder channels last, which is faster on CPUs and GPUs."""
        self = super().load(path, **options)
        if self.pipeline.vae is not None:
            self.pipeline.vae.to(memory_format=torch.channels_last)
        if self.pipeline.transformer is None and self.pipeline.text_encoder_3 is None:
            # Without T5 the pipeline pads prompts to the width that the network's configuration
            # says; where the text encoders alone are loaded, that is all it needs of it.
            folder = backbones.EMBEDDED.get(str(path), path)
            config: Any = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
            with torch.device("meta"):
                self.pipeline.transformer = SD3Transformer2DModel.from_config(config)
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        """Default (height, width) in pixels."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        config, scale = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        multiple = scale * config.patch_size
        h, w = self._spatial(height, width, frames, scale=scale, multiple=multiple)
        largest = config.pos_embed_max_size * multiple
        if max(height, width) > largest:
            raise ValueError(
                f"height and width must be at most {largest} pixels, got {height} x {width}"
            )
        return config.in_channels, h, w

    def _schedule(self, num_steps: int, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        tokens = (
            latent_shape[-1] * latent_shape[-2] // self.pipeline.transformer.config.patch_size**2
        )
        shift = dynamic_shift(self.pipeline.scheduler, tokens, calculate_shift)
        return {"num_inference_steps": num_steps, "mu": shift}

    def _encode(self, prompts: list[str]) -> Conditioning:
        return encode_prompts(self.pipeline, prompts, self.max_sequence_length)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        (velocity,) = transformer(
            hidden_states=x.to(self.dtype),
            # SD3 was trained on t in [0, 1000]; float32, since bfloat16 has no 999.
            timestep=t.float() * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            return_dict=False,
        )
        return velocity.float()

    def blank(self, prompts: int) -> Conditioning:
        config = self.pipeline.transformer.config
        length = self.tokens_read(self.pipeline.text_encoder) + self.max_sequence_length
        return Conditioning(
            tokens=torch.zeros(prompts, length, config.joint_attention_dim, dtype=self.dtype),
            pooled=torch.zeros(prompts, config.pooled_projection_dim, dtype=self.dtype),
        )


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], max_sequence_length: int
) -> Conditioning:
    """Conditioning of P prompts, differentiable with respect to the text encoders."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of strings, got one string")
    texts = list(prompts)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompt=texts,
        prompt_2=texts,
        prompt_3=texts,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    assert tokens is not None
    return Conditioning(tokens=tokens, pooled=pooled)


load = SD3Backbone.load
