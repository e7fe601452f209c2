"""LTX-2, text to video with sound, at its pipeline's 24 frames a second.

Both are one trajectory: the sound's latents follow the video's as further channels of the same
places, [128 + k, F, h, w], filled up to whole channels by elements that nothing reads and that have
velocity 0. So noise, log-densities, KL and clean estimates are of both; a mean over a latent's
elements counts those few, less than one channel of some 130, as zeros.

Guidance is classifier-free guidance alone, with one scale for both or `sound_guidance` for sound:
the stock pipeline with `stg_scale=0, modality_scale=1, guidance_rescale=0`, which by default runs
the network twice more and rescales the result. Prompt enhancement and predicted lengths are left
out; `decode` makes the video, `sound` what is heard, which goes to the rewards that take sound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from sfgrpo.backbones._loading import LEFT_OUT
from sfgrpo.backbones.base import Conditioning
from sfgrpo.backbones.ltx import LTXBackbone

FRAME_RATE = 24.0
"""Frames a second, the stock pipeline's default; rotary embeddings are of seconds, and so long is
the sound."""
ATTENTIONS = (
    "attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn",
)  # fmt: skip
UNUSED = "processor", "prompt_enhancer", "duration_head"
"""Parts that rewrite a prompt, or say how long its video is to be."""


class LTX2Backbone(LTXBackbone):
    """An LTX2Pipeline."""

    pipeline_classes = (LTX2Pipeline,)
    lora_targets = (
        *(f"{a}.{layer}" for a in ATTENTIONS for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj", "ff.net.2", "audio_ff.net.0.proj", "audio_ff.net.2",
    )  # fmt: skip
    default_length = 1024
    """Gemma's tokens."""
    encode_batch = 4  # the states of all layers go to the connectors
    masks_text = False
    makes_sound = True
    decoders = ("vae", "audio_vae", "vocoder")
    left_out: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "resident": UNUSED,
        "offload": UNUSED,
        "absent": (*LEFT_OUT["absent"], "connectors", *UNUSED),
        "only": (*LEFT_OUT["only"], "audio_vae", "vocoder", *UNUSED),
    }
    sound_guidance: float | None = None
    """The scale of guidance for sound; None for the video's."""

    @classmethod
    def load(cls, path: str | Path, *, sound_guidance: float | None = None, **options: Any) -> Self:
        """As every family's.

        Args:
            sound_guidance: the scale of classifier-free guidance for sound where
                `sample.guidance_scale` is not 1; None for the same as the video's.
        """
        self = super().load(path, **options)
        self.sound_guidance = sound_guidance
        return self

    def encoders(self) -> list[Any]:
        parts = self.pipeline.text_encoder, self.pipeline.connectors
        return [part for part in parts if part is not None]

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        channels, *places = super().latent_shape(height, width, frames)
        elements = self._sound_length(places[0]) * self._sound_width
        return channels + math.ceil(elements / math.prod(places)), *places

    @property
    def _sound_width(self) -> int:
        """Elements of one moment of the sound's latents, one token of the network."""
        return self.pipeline.transformer.config.audio_in_channels

    def _sound_length(self, frames: int) -> int:
        """Moments of the sound's latents beside so many frames of the video's."""
        pipeline, every = self.pipeline, self._strides()[0]
        a_second = pipeline.audio_sampling_rate / pipeline.audio_hop_length
        a_second /= float(pipeline.audio_vae_temporal_compression_ratio)
        return round(((frames - 1) * every + 1) / FRAME_RATE * a_second)

    def _sound_of(self, x: Tensor) -> Tensor:
        """The sound's latents [B, L, W] within latents [B, ...]."""
        length, width = self._sound_length(x.shape[2]), self._sound_width
        return x[:, self.channels :].flatten(1)[:, : length * width].unflatten(1, (length, width))

    def _encode(self, prompts: list[str]) -> Conditioning:
        pipeline, length = self.pipeline, self.max_sequence_length
        registers = pipeline.connectors.config.video_connector_num_learnable_registers
        if not registers:
            raise ValueError("model.path: the pipeline's connectors have no registers")
        if length % registers:
            raise ValueError(
                f"model.max_sequence_length: must be a multiple of {registers}, the registers that "
                f"this pipeline's connectors put in the place of padding, got {length}"
            )
        states, mask, *_ = pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=length,
        )  # fmt: skip
        # Registers stand in the place of padding, so that the network masks nothing.
        video, sound, _ = pipeline.connectors(
            states, mask, padding_side=pipeline.tokenizer.padding_side
        )
        return Conditioning(tokens=video, extra={"sound": sound})

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        frames, h, w = x.shape[2:]
        sound = self._sound_of(x)
        times = t.float() * self.pipeline.scheduler.config.num_train_timesteps
        video_tokens, sound_tokens = transformer(
            hidden_states=rearrange(
                x[:, : self.channels].to(self.dtype), "b c f h w -> b (f h w) c"
            ),
            audio_hidden_states=sound.to(self.dtype),
            encoder_hidden_states=cond.tokens,
            audio_encoder_hidden_states=cond.extra["sound"],
            timestep=times,
            sigma=times,
            num_frames=frames,
            height=h,
            width=w,
            fps=FRAME_RATE,
            audio_num_frames=sound.shape[1],
            use_cross_timestep=True,
            return_dict=False,
        )
        video = rearrange(video_tokens, "b (f h w) c -> b c f h w", f=frames, h=h)
        heard = sound_tokens.flatten(1)
        missing = x[0, self.channels :].numel() - heard.shape[1]
        beside = F.pad(heard, (0, missing)).unflatten(1, (-1, frames, h, w))
        return torch.cat([video, beside], 1).float()

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        if self.sound_guidance is None:
            return v, v_uncond
        scales = scale, self.sound_guidance
        both = (u.tensor_split([self.channels], 1) for u in (v_uncond, v))
        parts = zip(*both, scales, strict=True)
        return torch.cat([torch.lerp(low, high, w) for low, high, w in parts], 1), None

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents[:, : self.channels])

    @property
    def sound_rate(self) -> int:
        """Samples a second of `sound`."""
        return self.pipeline.vocoder.config.output_sampling_rate

    @torch.no_grad()
    def sound(self, latents: Tensor) -> Tensor:
        """What is heard beside `decode(latents)`: float32 [B, channels, samples] in [-1, 1]."""
        pipeline = self.pipeline
        vae, found = pipeline.audio_vae, []
        bins = vae.config.mel_bins // pipeline.audio_vae_mel_compression_ratio
        for part in latents.to(self.device, vae.dtype).split(self.decode_batch):
            unscaled = self._sound_of(part) * vae.latents_std + vae.latents_mean
            spectrum = vae.decode(
                rearrange(unscaled, "b l (c m) -> b c l m", m=bins), return_dict=False
            )
            found.append(pipeline.vocoder(spectrum[0]).float())
        return torch.cat(found)

    def blank(self, prompts: int) -> Conditioning:
        config, length = self.pipeline.transformer.config, self.max_sequence_length
        widths = config.caption_channels, config.caption_channels
        if not config.use_prompt_embeddings:  # then the connectors' are as wide as the network
            widths = config.cross_attention_dim, config.audio_cross_attention_dim
        tokens, sound = (torch.zeros(prompts, length, width, dtype=self.dtype) for width in widths)
        return Conditioning(tokens=tokens, extra={"sound": sound})


load = LTX2Backbone.load
