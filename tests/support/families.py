"""A tiny pipeline of every family: real classes, random weights, tokenizers built here.

Each builder returns a pipeline as `from_pretrained` would; `save` writes it as a folder. Weights
are normal, none of them zero, so that no part of a network hides behind a zero projection.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from sfgrpo.embedded import architecture

diffusers: Any = importlib.import_module("diffusers")  # its names are made at run time

PROMPTS = ["a red seven on a dark blue background", "an orange two"]
NEGATIVE = "blurry"
WIDTH = 32
"""Of every text encoder."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is built and called."""

    build: Callable[[], Any]
    backbone: str
    """File in sfgrpo/backbones."""
    size: tuple[int, int, int] = (32, 32, 1)
    """Height, width, frames."""
    length: int = 24
    """Text tokens."""
    embedded_guidance: float | None = None
    guided: Callable[[float], dict[str, Any]] | None = None
    """Arguments of the stock pipeline for classifier-free guidance with scale w (1: none)."""
    stock: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the stock pipeline."""


def normal(network: torch.nn.Module, seed: int, std: float = 0.08) -> Any:
    """Fill a network's parameters with noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def scheduler(**options: Any) -> Any:
    """A FlowMatchEulerDiscreteScheduler with the options of a published model."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def t5_tokenizer() -> Any:
    """A Unigram tokenizer of single characters, as T5's and UMT5's are of pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz▁,."
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in letters)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer without merges and with a chat template, as Qwen's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    vocab |= {token: len(vocab) + k for k, token in enumerate(("<|im_start|>", "<|im_end|>"))}
    return transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token="<|im_end|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], chat_template=CHAT,
    )  # fmt: skip


def t5(kind: str) -> Any:
    """A T5EncoderModel or UMT5EncoderModel."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return normal(getattr(transformers, f"{kind}EncoderModel")(config), 2)


def language(layers: int = 3, **more: Any) -> dict[str, Any]:
    """The configuration of a decoder-only language model."""
    return {
        "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": layers,
        "max_position_embeddings": 2048, **more,
    }  # fmt: skip


def vae(**more: Any) -> Any:
    """An AutoencoderKL of factor 8, four channels of which two are halved: 32 pixels -> 4."""
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        scaling_factor=0.36, shift_factor=0.12, **more,
    )  # fmt: skip
    return normal(made, 3, std=0.2)


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
    """FLUX.2-dev. Published folders wrap the tokenizer in a PixtralProcessor, which needs
    torchvision; without images it does what the tokenizer does."""
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **language(30)},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "image_size": 32,
            "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 8,
        },
        image_token_index=7,
    )  # fmt: skip
    encoder = normal(transformers.Mistral3ForConditionalGeneration(config), 2)
    return diffusers.Flux2Pipeline(
        **flux2_parts(guidance=True), text_encoder=encoder, tokenizer=byte_tokenizer()
    )


def klein() -> Any:
    """FLUX.2-klein-base: Qwen 3, classifier-free guidance."""
    encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**language(27)))
    return diffusers.Flux2KleinPipeline(
        **flux2_parts(guidance=False), text_encoder=normal(encoder, 2), tokenizer=byte_tokenizer()
    )


def wan_vae(**more: Any) -> dict[str, Any]:
    """Configuration of a Wan autoencoder of four channels."""
    return {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True], "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 2.0, 0.7, 1.0], **more,
    }  # fmt: skip


def qwenimage() -> Any:
    """Qwen-Image."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=language(
            2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}
        ),
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return diffusers.QwenImagePipeline(
        scheduler=scheduler(**{**DYNAMIC, "max_shift": 0.9, "shift_terminal": 0.02}),
        vae=normal(diffusers.AutoencoderKLQwenImage(**wan_vae()), 3, std=0.2),
        transformer=normal(transformer, 1, std=0.2), text_encoder=normal(encoder, 2),
        tokenizer=byte_tokenizer(),
    )  # fmt: skip


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


def _true_cfg(scale: float) -> dict[str, Any]:
    negative = {"negative_prompt": [NEGATIVE] * len(PROMPTS)} if scale != 1 else {}
    return {"true_cfg_scale": scale, **negative}


def _cfg(scale: float) -> dict[str, Any]:
    return {"guidance_scale": scale, "negative_prompt": [NEGATIVE] * len(PROMPTS)}


VIDEO = {"size": (32, 32, 5), "guided": _cfg, "stock": {"num_frames": 5}}
FAMILIES = {
    "sd3": Family(build=sd3, backbone="sd3", guided=_cfg),
    "flux": Family(
        build=flux, backbone="flux", embedded_guidance=3.5, guided=_true_cfg,
        stock={"guidance_scale": 3.5},
    ),
    "flux2": Family(
        build=flux2, backbone="flux2", embedded_guidance=4.0, length=512,
        stock={"guidance_scale": 4.0},
    ),
    "flux2-klein": Family(
        build=klein, backbone="flux2", length=96,
        # klein's negative prompt is "".
        guided=lambda scale: {"guidance_scale": scale},
    ),
    "qwenimage": Family(build=qwenimage, backbone="qwenimage", guided=_true_cfg, length=256),
    "wan": Family(build=wan, backbone="wan", **VIDEO),
    "wan22": Family(build=wan22, backbone="wan", **VIDEO),
    "wan22-ti2v": Family(build=wan22_ti2v, backbone="wan", **VIDEO),
    "zimage": Family(
        build=zimage, backbone="zimage", length=96,
        # Its pipeline's scale is 0 for none.
        guided=lambda scale: {**_cfg(scale), "guidance_scale": scale - 1},
    ),
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Build a family's pipeline and write it as a folder."""
    FAMILIES[name].build().save_pretrained(folder)
    return folder
