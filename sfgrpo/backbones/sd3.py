"""Stable Diffusion 3 and 3.5, and any pipeline folder of the same classes (the embedded model).

Left out of the stock pipeline: image prompts (IP adapter), skip-layer guidance and CLIP skip.
Classifier-free guidance is the sampler's business: it combines two calls of `velocity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from sfgrpo.backbones.base import Conditioning

EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"

FLOW_GRPO_LORA_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""The attention projections that Flow-GRPO's SD3 training script adapts (arXiv 2505.05470)."""


class SD3Backbone:
    """The parts of a StableDiffusion3Pipeline, called the way the pipeline calls them.

    The decoder runs in float32: SD3's overflows in float16. Text encoders and autoencoder are
    frozen; `transformer.requires_grad` is left as it is.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        max_sequence_length: int = 256,
        decode_batch: int = 64,
    ) -> None:
        """Wrap a loaded pipeline.

        `max_sequence_length` is the number of T5 tokens; a pipeline without T5 pads that many
        zeros, so a model that was never trained with them wants 0. `decode_batch` bounds the
        images decoded at once (memory).
        """
        if max_sequence_length < 0 or decode_batch < 1:
            raise ValueError(
                "max_sequence_length must be >= 0 and decode_batch >= 1, got "
                f"{max_sequence_length} and {decode_batch}"
            )
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.decode_batch = decode_batch
        self.lora_targets = FLOW_GRPO_LORA_TARGETS
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        for frozen in (pipeline.vae, *encoders):
            if frozen is not None:
                frozen.requires_grad_(False).eval()

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return self.pipeline.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.text_encoder.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        scale = self.pipeline.vae_scale_factor
        multiple = scale * config.patch_size
        largest = config.pos_embed_max_size * multiple
        for name, pixels in (("height", height), ("width", width)):
            if pixels < multiple or pixels % multiple or pixels > largest:
                raise ValueError(
                    f"{name} must be a multiple of {multiple} between {multiple} and {largest}, "
                    f"got {pixels}"
                )
        return config.in_channels, height // scale, width // scale

    def sigmas(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        # A fresh scheduler: set_timesteps changes the one it is called on.
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps, device="cpu")
        return scheduler.sigmas.clone()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        unscaled = latents.to(self.device, torch.float32) / config.scaling_factor
        parts = (unscaled + config.shift_factor).split(self.decode_batch)
        images = [self.pipeline.vae.decode(part, return_dict=False)[0] for part in parts]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        transformer = self.pipeline.transformer
        adapters = getattr(transformer, "peft_config", None)
        if not adapters:
            transformer.save_pretrained(folder / "transformer")
            return
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers={**get_peft_model_state_dict(transformer)},
            transformer_lora_adapter_metadata=adapters["default"].to_dict(),
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
    assert pooled is not None
    return Conditioning(tokens=tokens, pooled=pooled)


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = 256,
    decode_batch: int = 64,
    **from_pretrained: Any,
) -> SD3Backbone:
    """Load a pipeline folder or a Hub id; "embedded" is the small model in this package.

    Further options go to `StableDiffusion3Pipeline.from_pretrained` (`revision`, `variant`, ...).
    OSError says where a folder or id was looked for.
    """
    folder = EMBEDDED if str(path) == "embedded" else path
    index = StableDiffusion3Pipeline.load_config(folder, **from_pretrained)
    assert isinstance(index, dict)
    # A part saved as None (SD3 without T5) has to be passed as None.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, dtype=dtype, **{**absent, **from_pretrained}
    )
    pipeline.to(device)
    pipeline.vae.to(dtype=torch.float32, memory_format=torch.channels_last)
    return SD3Backbone(pipeline, max_sequence_length=max_sequence_length, decode_batch=decode_batch)
