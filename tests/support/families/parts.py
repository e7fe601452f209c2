"""What the tiny pipelines are made of: tokenizers, text encoders, autoencoders, schedulers."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from einops import rearrange
from PIL import Image
from torch import Tensor

from sfgrpo.backbones._tokens import PACK, UNPACK
from sfgrpo.prompts import Prompt, images

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
    negative: str = NEGATIVE
    """Negative prompt under guidance; "" where the stock pipeline treats others in its own way."""
    stock: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the stock pipeline."""
    given: Callable[[Tensor], Tensor] = lambda noise: noise
    """Our noise -> the `latents` that the stock pipeline takes."""
    also: Callable[[Any, Tensor], dict[str, Tensor]] = lambda pipeline, noise: {}
    """(pipeline, our noise) -> further latents that it takes."""
    taken: Callable[[Any, Any, Tensor], Tensor] = lambda pipeline, latents, noise: latents
    """(pipeline, its final latents, a tuple where it takes several, our noise) -> those as ours."""
    roundings: int = 4
    """How many of float32's, of numbers as large as latents are, its unguided rollout is off."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keys of the recipe's `model`, which are the backbone's options."""
    made: str = "DiffusionPipeline"
    """The stock pipeline that is asked to read the folder; this one reads what the folder names."""
    images: int = 0
    """How many each prompt brings."""
    shown: Callable[[Sequence[Sequence[Image.Image]]], dict[str, Any]] = lambda _: {}
    """Arguments of the stock pipeline for the images of each prompt."""
    one_by_one: bool = False
    """Whether the stock pipeline takes one prompt at a time."""
    given_parts: Callable[[Path], dict[str, Any]] = lambda _: {}
    """Parts of a folder that its stock pipeline reads only beside torchvision."""
    told: Callable[[Any, float], None] = lambda pipeline, guidance: None
    """Sets what the stock pipeline takes no argument for."""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    """In which the stock pipeline is called."""

    def prompts(self, texts: Sequence[str] = PROMPTS) -> list[Prompt]:
        """As they come from a file, with images of their own."""
        return [
            Prompt(text, {}, images=tuple(picture(10 * row + k) for k in range(self.images)))
            for row, text in enumerate(texts)
        ]


def packed(noise: Tensor) -> Tensor:
    """Tokens of 2 x 2 patches, which some stock pipelines take and hand out."""
    return rearrange(noise, PACK, p=2, q=2)


def unpacked(pipeline: Any, latents: Tensor, noise: Tensor) -> Tensor:
    """The inverse of `packed`."""
    return rearrange(latents, UNPACK, h=noise.shape[-2] // 2, p=2, q=2)


PACKED: dict[str, Any] = {"given": packed, "taken": unpacked}


def picture(seed: int, size: tuple[int, int] = (56, 40)) -> str:
    """A smooth image of (width, height) as a source of `sfgrpo.prompts.images`."""
    generator, file = torch.Generator().manual_seed(seed), io.BytesIO()
    coarse = (torch.rand(3, 4, 3, generator=generator) * 255).byte().numpy()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "png")
    return images.inline({"bytes": file.getvalue(), "path": None})


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


LETTERS = "abcdefghijklmnopqrstuvwxyz▁,."


def t5_tokenizer() -> Any:
    """A Unigram tokenizer of single characters, as T5's and UMT5's are of pieces."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in LETTERS)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def gemma_tokenizer() -> Any:
    """A BPE tokenizer of single characters, each text after a <bos> and padded in front until told
    otherwise, as Gemma's."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab = {token: index for index, token in enumerate((*special, *LETTERS, *"<>'#:-"))}
    return transformers.GemmaTokenizer(
        vocab=vocab, merges=[], add_bos_token=True, padding_side="left"
    )


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(known: str = "") -> Any:
    """A byte-level BPE tokenizer without merges and with a chat template, as Qwen's; the words of
    `known` are tokens of their own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    vocab |= {token: len(vocab) + k for k, token in enumerate(("<|im_start|>", "<|im_end|>"))}
    made = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token="<|im_end|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], chat_template=CHAT,
    )  # fmt: skip
    made.add_tokens(sorted(set(known.split())))
    return made


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
        scaling_factor=0.36, **{"shift_factor": 0.12, **more},
    )  # fmt: skip
    return normal(made, 3, std=0.2)


def wan_vae(**more: Any) -> dict[str, Any]:
    """Configuration of a Wan autoencoder of four channels."""
    return {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True], "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 2.0, 0.7, 1.0], **more,
    }  # fmt: skip


def true_cfg(scale: float) -> dict[str, Any]:
    negative = {"negative_prompt": [NEGATIVE] * len(PROMPTS)} if scale != 1 else {}
    return {"true_cfg_scale": scale, **negative}


def cfg(scale: float) -> dict[str, Any]:
    return {"guidance_scale": scale, "negative_prompt": [NEGATIVE] * len(PROMPTS)}
