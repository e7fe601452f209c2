"""Families that make images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor

from sfgrpo.embedded import architecture
from tests.support.families.parts import (
    DYNAMIC,
    PACKED,
    WIDTH,
    Family,
    byte_tokenizer,
    cfg,
    diffusers,
    gemma_tokenizer,
    language,
    normal,
    scheduler,
    t5,
    t5_tokenizer,
    true_cfg,
    vae,
    wan_vae,
)


def sd3() -> Any:
    """Stable Diffusion 3 with T5, which the embedded model leaves out."""
    pipeline = architecture.build_pipeline(0)
    encoder = architecture.build_text_encoder
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=256,
        caption_projection_dim=32, pooled_projection_dim=2 * architecture.TEXT_WIDTH,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    config = transformers.T5Config(
        vocab_size=40, d_model=256, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    parts: dict[str, Any] = {
        **pipeline.components, "scheduler": scheduler(shift=3.0), "vae": vae(),
        "transformer": normal(transformer, 1, std=0.2), "text_encoder": normal(encoder(), 2),
        "text_encoder_2": normal(encoder(), 4), "tokenizer_3": t5_tokenizer(),
        "text_encoder_3": normal(transformers.T5EncoderModel(config), 5),
    }  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(**parts)


def flux() -> Any:
    """FLUX.1-dev: reads its guidance."""
    clip = architecture.build_text_encoder().config
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=clip.hidden_size,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=scheduler(**DYNAMIC), vae=vae(), transformer=normal(transformer, 1, std=0.2),
        text_encoder=normal(transformers.CLIPTextModel(clip), 2), text_encoder_2=t5("T5"),
        tokenizer=architecture.build_tokenizer(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def chroma() -> Any:
    """Chroma."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=scheduler(**DYNAMIC), vae=vae(), transformer=normal(transformer, 1, std=0.2),
        text_encoder=t5("T5"), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def flux2_parts(*, guidance: bool) -> dict[str, Any]:
    """Scheduler, autoencoder and transformer of FLUX.2."""
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    normal(autoencoder, 3, std=0.2)
    autoencoder.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    autoencoder.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    normal(transformer, 1, std=0.2)
    return {"scheduler": scheduler(**DYNAMIC), "vae": autoencoder, "transformer": transformer}


def flux2() -> Any:
    """FLUX.2-dev."""
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **language(30)},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "image_size": 32,
            "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 8,
        },
        image_token_index=7,
    )  # fmt: skip
    encoder = normal(transformers.Mistral3ForConditionalGeneration(config), 2)
    pipeline = diffusers.Flux2Pipeline(
        **flux2_parts(guidance=True), text_encoder=encoder, tokenizer=byte_tokenizer()
    )
    # As published folders say, where a processor wraps the tokenizer.
    pipeline.register_to_config(tokenizer=("transformers", "PixtralProcessor"))
    return pipeline


def bare_tokenizer(folder: Path) -> dict[str, Any]:
    """FLUX.2's tokenizer, whose processor needs torchvision; of texts it makes the same."""
    return {"tokenizer": transformers.TokenizersBackend.from_pretrained(folder / "tokenizer")}


def flux2_latents(pipeline: Any, latents: Tensor, noise: Tensor) -> Tensor:
    """FLUX.2 hands out tokens."""
    return rearrange(latents, "b (h w) c -> b c h w", h=noise.shape[-2])


def klein_latents(pipeline: Any, latents: Tensor, noise: Tensor) -> Tensor:
    """klein's pipeline hands out latents with their normalisation undone."""
    bn = pipeline.vae.bn
    patches = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    std = torch.sqrt(bn.running_var + pipeline.vae.config.batch_norm_eps)
    return (patches - bn.running_mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def klein() -> Any:
    """FLUX.2-klein-base: Qwen 3, classifier-free guidance."""
    encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**language(27)))
    return diffusers.Flux2KleinPipeline(
        **flux2_parts(guidance=False), text_encoder=normal(encoder, 2), tokenizer=byte_tokenizer()
    )


def qwen_vl(words: int = 300, **more: Any) -> Any:
    """A Qwen2.5-VL of so many words."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=language(2, vocab_size=words, rope_parameters=rope),
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
        **more,
    )  # fmt: skip
    return normal(transformers.Qwen2_5_VLForConditionalGeneration(config), 2)


def qwenimage(**more: Any) -> Any:
    """Qwen-Image."""
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), **more,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=scheduler(**{**DYNAMIC, "max_shift": 0.9, "shift_terminal": 0.02}),
        vae=normal(diffusers.AutoencoderKLQwenImage(**wan_vae()), 3, std=0.2),
        transformer=normal(transformer, 1, std=0.2), text_encoder=qwen_vl(),
        tokenizer=byte_tokenizer(),
    )  # fmt: skip


def zimage() -> Any:
    """Z-Image."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[512, 32, 32],
    )  # fmt: skip
    encoder = transformers.Qwen3Model(transformers.Qwen3Config(**language()))
    return diffusers.ZImagePipeline(
        scheduler=scheduler(shift=3.0), vae=vae(), transformer=normal(transformer, 1, std=0.2),
        text_encoder=normal(encoder, 2), tokenizer=byte_tokenizer(),
    )  # fmt: skip


def auraflow() -> Any:
    """AuraFlow."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=4, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        scheduler=scheduler(shift=1.73), vae=vae(shift_factor=None), text_encoder=t5("UMT5"),
        transformer=normal(transformer, 1, std=0.13), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def cogview4() -> Any:
    """CogView4: a schedule that is shifted by the number of tokens along a line."""
    encoder = transformers.GlmModel(transformers.GlmConfig(**language(pad_token_id=0)))
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    shifting = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return diffusers.CogView4Pipeline(
        scheduler=scheduler(use_dynamic_shifting=True, **shifting), vae=vae(shift_factor=0.0),
        transformer=normal(transformer, 1, std=0.2), text_encoder=normal(encoder, 2),
        tokenizer=gemma_tokenizer(),  # GLM's, too, puts tokens of its own before an empty text
    )  # fmt: skip


FAMILIES = {
    "sd3": Family(build=sd3, backbone="sd3", guided=cfg),
    "flux": Family(
        build=flux, backbone="flux", embedded_guidance=3.5, guided=true_cfg,
        stock={"guidance_scale": 3.5}, **PACKED,
    ),
    "chroma": Family(build=chroma, backbone="chroma", guided=cfg, **PACKED),
    "flux2": Family(
        build=flux2, backbone="flux2", embedded_guidance=4.0, length=512,
        stock={"guidance_scale": 4.0}, taken=flux2_latents, given_parts=bare_tokenizer,
    ),
    "flux2-klein": Family(
        build=klein, backbone="flux2", length=96, taken=klein_latents, negative="",
        # It knows no other negative prompt.
        guided=lambda scale: {"guidance_scale": scale},
    ),
    "qwenimage": Family(
        build=qwenimage, backbone="qwenimage", guided=true_cfg, length=256, **PACKED,
    ),
    "zimage": Family(
        build=zimage, backbone="zimage", length=96,
        # Its pipeline's scale is 0 for none.
        guided=lambda scale: {**cfg(scale), "guidance_scale": scale - 1},
    ),
    "auraflow": Family(build=auraflow, backbone="auraflow", guided=cfg),
    "cogview4": Family(
        build=cogview4, backbone="cogview4", guided=cfg, length=48, one_by_one=True,
    ),
}  # fmt: skip
