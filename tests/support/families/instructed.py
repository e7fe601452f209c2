"""Families that read a prompt, but not a negative one, after an instruction to a Gemma."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.families.parts import (
    WIDTH,
    Family,
    cfg,
    diffusers,
    gemma_tokenizer,
    language,
    normal,
    scheduler,
    vae,
    wan_vae,
)


def gemma(layers: int = 3) -> Any:
    """A Gemma 2 without its head."""
    return normal(transformers.Gemma2Model(transformers.Gemma2Config(**language(layers))), 2)


def lumina2() -> Any:
    """Lumina-Image 2.0."""
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 4, 4), axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        scheduler=scheduler(shift=6.0), vae=vae(), transformer=normal(transformer, 1, std=0.2),
        text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def sana() -> Any:
    """SANA, with Euler's scheduler; published folders come with DPM-Solver."""
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.41,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=WIDTH, sample_size=8,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        scheduler=scheduler(shift=3.0), vae=normal(autoencoder, 3, std=0.1),
        transformer=normal(transformer, 1, std=0.08), text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def sana_video(**more: Any) -> Any:
    """SANA-Video, with Wan's autoencoder and Euler's scheduler; published folders come with
    DPM-Solver."""
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=WIDTH, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLWan(**wan_vae())
    parts: dict[str, Any] = {
        "scheduler": scheduler(shift=8.0), "vae": normal(autoencoder, 3, std=0.2),
        "transformer": normal(transformer, 1, std=0.2), "text_encoder": gemma(1),
        "tokenizer": gemma_tokenizer(),
    }  # fmt: skip
    return diffusers.SanaVideoPipeline(**{**parts, **more})


FAMILIES = {
    "lumina2": Family(build=lumina2, backbone="lumina2", guided=cfg, length=256),
    "sana": Family(
        build=sana, backbone="sana", guided=cfg, length=32,
        stock={"use_resolution_binning": False},
    ),
    "sana-video": Family(
        build=sana_video, backbone="sana_video", guided=cfg, length=32, size=(32, 32, 5),
        stock={"use_resolution_binning": False, "frames": 5},
    ),
}  # fmt: skip
