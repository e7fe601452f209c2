"""Families that make videos with sound."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor

from tests.support.families.parts import (
    NEGATIVE,
    PROMPTS,
    WIDTH,
    Family,
    diffusers,
    gemma_tokenizer,
    language,
    normal,
    scheduler,
)

MOMENTS, BINS = 5, 4
"""Of the sound's latents beside five frames: so many, each of two channels of so many bins."""


def gemma3() -> Any:
    """A Gemma 3, which could read images, too."""
    config = transformers.Gemma3Config(
        text_config=language(sliding_window=64, query_pre_attn_scalar=8),
        vision_config={
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 16,
            "num_attention_heads": 1, "patch_size": 8,
        },
        mm_tokens_per_image=4,
    )  # fmt: skip
    return normal(transformers.Gemma3ForConditionalGeneration(config), 2)


def ltx2_vae() -> Any:
    """Of the video: 8 pixels and 2 frames a place."""
    made = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 2, upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(False, False), upsample_factor=(1, 1), decoder_causal=False,
        spatial_compression_ratio=8, temporal_compression_ratio=2,
    )  # fmt: skip
    normal(made, 3, std=0.03)
    made.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    made.latents_std.copy_(torch.tensor([1.5, 2.0, 0.7, 1.0]))
    return made


def sound_vae() -> Any:
    """Of the sound: spectra of 16 bins, 4 of them a bin of the latents."""
    made = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, latent_channels=2, ch_mult=(1, 1, 1), num_res_blocks=1, resolution=16,
        mel_bins=16,
    )  # fmt: skip
    normal(made, 4, std=0.2)
    generator = torch.Generator().manual_seed(5)
    made.latents_mean.copy_(0.2 * torch.randn(8, generator=generator))
    made.latents_std.copy_(0.5 + torch.rand(8, generator=generator))
    return made


def ltx2(connecting: dict[str, Any] | None = None, **more: Any) -> Any:
    """LTX-2.0; or with what changes the connectors and the network."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=1, caption_channels=WIDTH, vae_scale_factors=(2, 8, 8), **more,
    )  # fmt: skip
    kinds = {
        f"{kind}_connector_{what}": value
        for kind in ("video", "audio")
        for what, value in {
            "num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "num_layers": 1,
            "num_learnable_registers": 8,
        }.items()
    }  # fmt: skip
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=4, **{**kinds, **(connecting or {})}
    )
    vocoder = diffusers.pipelines.ltx2.LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip
    shifting = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
    return diffusers.LTX2Pipeline(
        scheduler=scheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifting),
        vae=ltx2_vae(), audio_vae=sound_vae(), vocoder=normal(vocoder, 6, std=0.2),
        text_encoder=gemma3(), tokenizer=gemma_tokenizer(), connectors=normal(connectors, 7),
        transformer=normal(transformer, 1, std=0.2),
    )  # fmt: skip


def ltx23() -> Any:
    """LTX-2.3: gated attention, text modulated by the time, a projection for each modality."""
    connecting = {
        "per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16,
        "audio_connector_attention_head_dim": 8, "video_gated_attn": True,
        "audio_gated_attn": True, "rope_type": "split", "proj_bias": True,
    }  # fmt: skip
    return ltx2(
        connecting, gated_attn=True, audio_gated_attn=True, cross_attn_mod=True,
        audio_cross_attn_mod=True, use_prompt_embeddings=False, rope_type="split",
        perturbed_attn=True,
    )  # fmt: skip


def parts(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of our latents the video's, the sound's [B, L, W], and the places that are neither's."""
    beside = noise[:, 4:].flatten(1)
    heard = MOMENTS * 2 * BINS
    return noise[:, :4], beside[:, :heard].unflatten(1, (MOMENTS, -1)), beside[:, heard:]


def tokens(noise: Tensor) -> Tensor:
    """LTX-2's pipeline takes tokens."""
    return rearrange(parts(noise)[0], "b c f h w -> b (f h w) c")


def sound_too(pipeline: Any, noise: Tensor) -> dict[str, Tensor]:
    """Those of the sound it normalises, even where they are noise; exactly in double precision."""
    vae = pipeline.audio_vae
    return {"audio_latents": parts(noise)[1].double() * vae.latents_std + vae.latents_mean}


def together(pipeline: Any, made: tuple[Tensor, ...], noise: Tensor) -> Tensor:
    """It hands out both with their normalisations undone."""
    video, sound = (part.double() for part in made)
    means = pipeline.vae.latents_mean, pipeline.vae.latents_std
    video = pipeline._normalize_latents(video, *means, pipeline.vae.config.scaling_factor)
    heard = pipeline._normalize_audio_latents(
        pipeline._pack_audio_latents(sound), pipeline.audio_vae.latents_mean,
        pipeline.audio_vae.latents_std,
    )  # fmt: skip
    beside = torch.cat([heard.flatten(1), parts(noise)[2]], 1)
    return torch.cat([video, beside.unflatten(1, (-1, *video.shape[2:]))], 1).float()


def cfg(scale: float, sound: float | None = None) -> dict[str, Any]:
    """Guidance as served here, without what the stock pipeline adds to it by default."""
    return {
        "guidance_scale": scale, "audio_guidance_scale": sound or scale,
        "negative_prompt": [NEGATIVE] * len(PROMPTS),
    }  # fmt: skip


PLAIN: dict[str, Any] = {
    f"{prefix}{name}": value
    for prefix in ("", "audio_")
    for name, value in {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}.items()
}
BOTH: dict[str, Any] = {
    "backbone": "ltx2", "size": (32, 32, 5), "length": 40, "given": tokens, "also": sound_too,
    "taken": together, "stock": {"num_frames": 5, **PLAIN},
    "roundings": 12,  # its pipeline turns every velocity into data and back
}  # fmt: skip
FAMILIES: dict[str, Family] = {"ltx2": Family(build=ltx2, guided=cfg, **BOTH)}
LTX23 = Family(
    build=ltx23, guided=lambda scale: cfg(scale, 5.0), options={"sound_guidance": 5.0}, **BOTH
)
"""Its sound guided more than its video."""
