"""Families whose text encoder is a Qwen3-VL."""

from __future__ import annotations

from typing import Any

import transformers

from sfgrpo.processors import OF_IMAGES
from tests.support.families.parts import (
    DYNAMIC,
    PACKED,
    WIDTH,
    Family,
    byte_tokenizer,
    cfg,
    diffusers,
    language,
    normal,
    scheduler,
    true_cfg,
    wan_vae,
)


def config(words: int = 300) -> Any:
    """Of a Qwen3-VL of so many words."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return transformers.Qwen3VLConfig(
        text_config=language(2, vocab_size=words, rope_parameters=rope),
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip


def krea2(**more: Any) -> Any:
    """Krea 2: two layers' states of a Qwen3-VL, on twice as many of which the network has heads."""
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=WIDTH,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=48, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=scheduler(**{**DYNAMIC, "max_image_seq_len": 6400}),
        vae=normal(diffusers.AutoencoderKLQwenImage(**wan_vae()), 3, std=0.2),
        transformer=normal(transformer, 1, std=0.2), tokenizer=byte_tokenizer(),
        text_encoder=normal(transformers.Qwen3VLModel(config()), 2),
        text_encoder_select_layers=(1, 2), **more,
    )  # fmt: skip


def qwenimage21(**more: Any) -> Any:
    """Qwen-Image 2.1, without transparency."""
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.7, 1.0], **{"in_channels": 3, "out_channels": 3, **more},
    )  # fmt: skip
    tokenizer = byte_tokenizer("<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>")
    reader = transformers.Qwen2VLImageProcessorPil(max_pixels=84 * 84)
    made = diffusers.QwenImage21Pipeline(
        scheduler=scheduler(**DYNAMIC), vae=normal(autoencoder, 3, std=0.2),
        text_encoder=normal(transformers.Qwen3VLForConditionalGeneration(config(400)), 2),
        processor=OF_IMAGES["Qwen3VLProcessor"](
            reader, tokenizer, chat_template=tokenizer.chat_template
        ),
        transformer=normal(transformer, 1, std=0.2),
    )  # fmt: skip
    # As published folders say, which were written beside torchvision.
    made.register_to_config(processor=("transformers", "Qwen3VLProcessor"))
    return made


def placed(noise: Any) -> Any:
    """Tokens of one place each."""
    return noise.flatten(2).transpose(1, 2)


FAMILIES = {
    "krea2": Family(
        build=krea2, backbone="krea2", length=256,
        # Its pipeline's scale is 0 for none.
        guided=lambda scale: {**cfg(scale), "guidance_scale": scale - 1},
        **PACKED,
    ),
    "qwenimage21": Family(
        build=qwenimage21, backbone="qwenimage21", size=(64, 64, 1), length=256, guided=true_cfg,
        one_by_one=True, given=placed,
        taken=lambda pipeline, latents, noise: latents.transpose(1, 2).reshape(noise.shape),
        given_parts=lambda folder: {
            "processor": OF_IMAGES["Qwen3VLProcessor"].from_pretrained(folder / "processor")
        },
    ),
}  # fmt: skip
