"""Families that make images of what two text encoders read, or four."""

from __future__ import annotations

from typing import Any

import transformers

from sfgrpo.embedded import architecture
from tests.support.families.images import qwen_vl
from tests.support.families.parts import (
    NEGATIVE,
    PROMPTS,
    WIDTH,
    Family,
    byte_tokenizer,
    cfg,
    diffusers,
    language,
    normal,
    scheduler,
    t5,
    t5_tokenizer,
    vae,
)


def clip(seed: int) -> Any:
    """A CLIP of more tokens than the embedded model's."""
    config = architecture.build_text_encoder().config
    config.max_position_embeddings = 77
    return normal(transformers.CLIPTextModelWithProjection(config), seed)


def hidream(**more: Any) -> Any:
    """HiDream-I1: experts, and the states of LLaMA's layers, of the last one twice."""
    pooled = 2 * architecture.TEXT_WIDTH
    options = {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": pooled, "axes_dims_rope": (8, 4, 4), "max_resolution": (4, 8),
        "llama_layers": [0, 1, 1],
    }  # fmt: skip
    transformer = diffusers.HiDreamImageTransformer2DModel(**{**options, **more})
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**language(2)))
    return diffusers.HiDreamImagePipeline(
        scheduler=scheduler(shift=3.0), vae=vae(), transformer=normal(transformer, 1, std=0.15),
        text_encoder=clip(2), text_encoder_2=clip(4), text_encoder_3=t5("T5"),
        text_encoder_4=normal(llama, 5), tokenizer=architecture.build_tokenizer(),
        tokenizer_2=architecture.build_tokenizer(), tokenizer_3=t5_tokenizer(),
        tokenizer_4=byte_tokenizer(),
    )  # fmt: skip


def small(pipeline: Any, guidance: float) -> None:
    """HiDream's pipeline makes images of one area alone, which is an attribute."""
    pipeline.default_sample_size = 4


# For time: of tokens that its pipeline pads to, which are 128.
diffusers.HunyuanImagePipeline.tokenizer_2_max_length = property(lambda _: 24, lambda *_: None)


def hunyuanimage(**more: Any) -> Any:
    """HunyuanImage 2.1; its guiders are set where it is called."""
    autoencoder = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32),
        layers_per_block=1, spatial_compression_ratio=8, sample_size=32, scaling_factor=0.75,
    )  # fmt: skip
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8), mlp_ratio=1.0, **more,
    )  # fmt: skip
    glyphs = transformers.T5Config(
        vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    pipeline = diffusers.HunyuanImagePipeline(
        scheduler=scheduler(shift=5.0), vae=normal(autoencoder, 3, std=0.1), tokenizer=None,
        transformer=normal(transformer, 1, std=0.2), tokenizer_2=transformers.ByT5Tokenizer(),
        text_encoder=qwen_vl(400), text_encoder_2=normal(transformers.T5EncoderModel(glyphs), 4),
        guider=diffusers.AdaptiveProjectedMixGuidance(),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(),
    )  # fmt: skip
    pipeline.register_modules(tokenizer=byte_tokenizer(pipeline.prompt_template_encode))
    return pipeline


def plain(pipeline: Any, guidance: float) -> None:
    """HunyuanImage's guidance is parts of the pipeline, its length an attribute."""
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.guider = pipeline.ocr_guider = guider
    pipeline.tokenizer_max_length = FAMILIES["hunyuanimage"].length


FAMILIES: dict[str, Family] = {
    "hidream": Family(build=hidream, backbone="hidream", guided=cfg, told=small),
    "hunyuanimage": Family(
        build=hunyuanimage, backbone="hunyuanimage", length=160, told=plain,
        guided=lambda _: {"negative_prompt": [NEGATIVE] * len(PROMPTS)},
    ),
}  # fmt: skip
