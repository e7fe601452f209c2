"""Families that make videos."""

from __future__ import annotations

from typing import Any

from tests.support.families.parts import (
    WIDTH,
    Family,
    cfg,
    diffusers,
    normal,
    scheduler,
    t5,
    t5_tokenizer,
    wan_vae,
)


def wan_transformer(seed: int, channels: int = 4) -> Any:
    """A Wan transformer; seeds tell the two of Wan 2.2 apart."""
    made = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return normal(made, seed, std=0.2)


def wan(**more: Any) -> Any:
    """Wan 2.1."""
    parts: dict[str, Any] = {
        "scheduler": scheduler(shift=3.0), "transformer": wan_transformer(1),
        "vae": normal(diffusers.AutoencoderKLWan(**wan_vae()), 3, std=0.2),
        "text_encoder": t5("UMT5"), "tokenizer": t5_tokenizer(),
    }  # fmt: skip
    return diffusers.WanPipeline(**{**parts, **more})


def wan22() -> Any:
    """Wan 2.2 A14B: two networks."""
    return wan(transformer_2=wan_transformer(6), boundary_ratio=0.7)


def wan22_ti2v() -> Any:
    """Wan 2.2 TI2V: a time per token, an autoencoder of factor 16."""
    options = wan_vae(
        decoder_base_dim=8, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16,
    )  # fmt: skip
    autoencoder = normal(diffusers.AutoencoderKLWan(**options), 3, std=0.2)
    return wan(vae=autoencoder, expand_timesteps=True)


VIDEO: dict[str, Any] = {"size": (32, 32, 5), "guided": cfg, "stock": {"num_frames": 5}}
FAMILIES = {
    "wan": Family(build=wan, backbone="wan", **VIDEO),
    "wan22": Family(build=wan22, backbone="wan", **VIDEO),
    "wan22-ti2v": Family(build=wan22_ti2v, backbone="wan", **VIDEO),
}
