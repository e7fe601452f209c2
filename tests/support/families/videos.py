"""Families that make videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as hunyuan
from einops import rearrange
from PIL import Image
from torch import Tensor

from sfgrpo.embedded import architecture
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
    true_cfg,
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


def wan_i2v(**more: Any) -> Any:
    """Wan 2.1 image to video: the network reads CLIP's embedding of the image, too."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    side = {"height": 16, "width": 16}
    parts: dict[str, Any] = {
        **wan().components, "transformer": i2v_transformer(1, image_dim=16, added_kv_proj_dim=24),
        "image_encoder": normal(transformers.CLIPVisionModel(config), 4),
        "image_processor": transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=side
        ),
    }  # fmt: skip
    return diffusers.WanImageToVideoPipeline(**{**parts, **more})


def i2v_transformer(seed: int, **more: Any) -> Any:
    """Of a mask, the start's latents and the sample's."""
    made = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, **more,
    )  # fmt: skip
    return normal(made, seed, std=0.2)


def wan22_i2v() -> Any:
    """Wan 2.2 A14B image to video: two networks, and no CLIP."""
    return wan_i2v(
        transformer=i2v_transformer(1), transformer_2=i2v_transformer(6), image_encoder=None,
        image_processor=None, boundary_ratio=0.7,
    )  # fmt: skip


def start(prompts: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """Of one prompt: Wan's pipeline starts all videos from one image."""
    ((image,),) = prompts
    return {"image": image}


def ltx() -> Any:
    """LTX-Video, with a decoder that reads a time."""
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2, layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False,) * 3,
        upsample_residual=(False, False), upsample_factor=(1, 1), downsample_type=("conv",) * 2,
        timestep_conditioning=True,
    )  # fmt: skip
    normal(autoencoder, 3, std=0.05)
    autoencoder.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.latents_std.copy_(torch.tensor([1.5, 2.0, 0.7, 1.0]))
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    shifting = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
    return diffusers.LTXPipeline(
        scheduler=scheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifting),
        vae=autoencoder, transformer=normal(transformer, 1, std=0.2), text_encoder=t5("T5"),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip


def tokens(noise: Tensor) -> Tensor:
    """LTX's pipeline takes and hands out tokens."""
    return rearrange(noise, "b c f h w -> b (f h w) c")


def no_tokens(pipeline: Any, latents: Tensor, noise: Tensor) -> Tensor:
    """The inverse of `tokens`."""
    return rearrange(latents, "b (f h w) c -> b c f h w", f=noise.shape[2], h=noise.shape[3])


def hunyuan_vae() -> Any:
    """HunyuanVideo's autoencoder, of four channels."""
    made = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    return normal(made, 3, std=0.1)


def hunyuanvideo() -> Any:
    """HunyuanVideo: reads its guidance."""
    clip = architecture.build_text_encoder().config
    clip.max_position_embeddings = 77  # which its pipeline pads to
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH, rope_axes_dim=(4, 6, 6),
        pooled_projection_dim=clip.hidden_size,
    )  # fmt: skip
    llama = transformers.LlamaModel(transformers.LlamaConfig(**language(vocab_size=400)))
    instruction = hunyuan.DEFAULT_PROMPT_TEMPLATE["template"]
    return diffusers.HunyuanVideoPipeline(
        scheduler=scheduler(shift=7.0), vae=hunyuan_vae(), tokenizer=byte_tokenizer(instruction),
        transformer=normal(transformer, 1, std=0.2), text_encoder=normal(llama, 2),
        text_encoder_2=normal(transformers.CLIPTextModel(clip), 2),
        tokenizer_2=architecture.build_tokenizer(),
    )  # fmt: skip


def always(value: int) -> Any:
    """An attribute that stays what it is."""
    return property(lambda _: value, lambda *_: None)


# For time: of tokens that its pipeline pads to, which are 256 and 729.
diffusers.HunyuanVideo15Pipeline.tokenizer_2_max_length = always(24)
diffusers.HunyuanVideo15Pipeline.vision_num_semantic_tokens = always(8)


def hunyuanvideo15() -> Any:
    """HunyuanVideo 1.5; its guider is set where it is called."""
    autoencoder = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        spatial_compression_ratio=8,
    )  # fmt: skip
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=1,
        num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6), mlp_ratio=1.0,
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = transformers.Qwen2_5_VLTextConfig(**language(vocab_size=400, rope_parameters=rope))
    glyphs = transformers.T5Config(
        vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    pipeline = diffusers.HunyuanVideo15Pipeline(
        scheduler=scheduler(shift=5.0), vae=normal(autoencoder, 3, std=0.1), tokenizer=None,
        transformer=normal(transformer, 1, std=0.2), tokenizer_2=transformers.ByT5Tokenizer(),
        text_encoder=normal(transformers.Qwen2_5_VLTextModel(text), 2),
        text_encoder_2=normal(transformers.T5EncoderModel(glyphs), 4),
        guider=diffusers.ClassifierFreeGuidance(),
    )  # fmt: skip
    pipeline.register_modules(tokenizer=byte_tokenizer(pipeline.system_message))
    return pipeline


def told(pipeline: Any, guidance: float) -> None:
    """HunyuanVideo 1.5's guidance is a part of the pipeline, its length an attribute."""
    pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance)
    pipeline.tokenizer_max_length = FAMILIES["hunyuanvideo15"].length
    pipeline.vae.enable_slicing()  # it fails on several videos at once


VIDEO: dict[str, Any] = {"size": (32, 32, 5), "guided": cfg, "stock": {"num_frames": 5}}
START: dict[str, Any] = {**VIDEO, "images": 1, "shown": start, "one_by_one": True}
FAMILIES: dict[str, Family] = {
    "wan": Family(build=wan, backbone="wan", **VIDEO),
    "wan22": Family(build=wan22, backbone="wan", **VIDEO),
    "wan22-ti2v": Family(build=wan22_ti2v, backbone="wan", **VIDEO),
    "wan-i2v": Family(build=wan_i2v, backbone="wan_i2v", **START),
    "wan22-i2v": Family(build=wan22_i2v, backbone="wan_i2v", **START),
    "wan22-ti2v-start": Family(
        build=wan22_ti2v, backbone="wan_i2v", made="WanImageToVideoPipeline", **START
    ),
    "ltx": Family(build=ltx, backbone="ltx", given=tokens, taken=no_tokens, **VIDEO),
    "hunyuanvideo": Family(
        build=hunyuanvideo, backbone="hunyuanvideo", embedded_guidance=6.0,
        **{**VIDEO, "guided": true_cfg}, length=64,
    ),
    "hunyuanvideo15": Family(
        build=hunyuanvideo15, backbone="hunyuanvideo15", length=160, told=told,
        **{**VIDEO, "guided": lambda _: {"negative_prompt": [NEGATIVE] * len(PROMPTS)}},
    ),
}  # fmt: skip
