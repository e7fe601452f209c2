"""The embedded model: Stable Diffusion 3's own classes, three orders of magnitude smaller.

Latents of 4 channels at a quarter of the resolution, two CLIP text encoders over a vocabulary of
the captions' words, no T5. A stock `StableDiffusion3Pipeline` in every respect, so that whatever
runs on it runs on SD3.5.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from sfgrpo.embedded.data import prompts
from sfgrpo.embedded.task import DIGIT, Task

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 12
TEXT_WIDTH = 64
WIDTH = 128
LATENT_CHANNELS = 4
REDUCTION = 4
"""Pixels to a latent, in each direction."""


def vocabulary(task: Task = DIGIT) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair vocabulary and merges that make every word of the captions one token.

    A word is merged from left to right ("r e", "re d</w>"). Letters stay in the vocabulary, so any
    lower-case text can be tokenised, if not understood. CLIP's tokenizer takes numerals one by one,
    so "472" is three words.
    """
    written = {word for entry in prompts(task) for word in entry["prompt"].split()}
    words = {part for word in written for part in (word if word.isdigit() else [word])}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    symbols = letters + [letter + "</w>" for letter in letters]
    merges: dict[tuple[str, str], None] = {}
    # Longest first: earlier merges win, and "re" of "red" must not break up "three".
    for word in sorted(words, key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[(pieces[0], pieces[1])] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    symbols += ["".join(pair) for pair in merges]
    symbols += sorted(word + "</w>" for word in words if word.isdigit())
    unique = list(dict.fromkeys([*symbols, BOS, EOS]))
    return {symbol: index for index, symbol in enumerate(unique)}, list(merges)


def build_tokenizer(task: Task = DIGIT) -> CLIPTokenizer:
    """A CLIP tokenizer of the captions' words, padded to `MAX_TOKENS`."""
    vocab, merges = vocabulary(task)
    options: dict[str, Any] = {"vocab": vocab, "merges": merges, "model_max_length": MAX_TOKENS}
    return CLIPTokenizer(**options)


def build_text_encoder(task: Task = DIGIT) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder; SD3 reads the last but one of its hidden states."""
    vocab, _ = vocabulary(task)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
        pad_token_id=vocab[EOS],
    )
    return CLIPTextModelWithProjection(config)


def build_vae(task: Task = DIGIT) -> AutoencoderKL:
    """An autoencoder of factor 4, without attention: at 8 x 8 it costs more than it gives."""
    options: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "sample_size": max(task.height, task.width),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return AutoencoderKL(**options)


def build_transformer(task: Task = DIGIT) -> SD3Transformer2DModel:
    """A four-layer MMDiT of width 128, with SD3.5's query-key normalisation.

    Positions are a square's, of which an image takes the middle (`PatchEmbed.cropped_pos_embed`).
    """
    side = max(task.height, task.width) // REDUCTION
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=side // 2,
        qk_norm="rms_norm",
    )
    initialise(transformer)
    return transformer


def initialise(transformer: SD3Transformer2DModel) -> None:
    """DiT's initialisation (Peebles and Xie 2023, arXiv 2212.09748): blocks start as identity.

    Linear layers are Xavier-uniform, the modulations and the output zero. diffusers leaves
    PyTorch's defaults, from which the same number of steps gets less far.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            closed = name.endswith(("norm1.linear", "norm1_context.linear"))
            if closed or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def build_pipeline(seed: int, task: Task = DIGIT) -> StableDiffusion3Pipeline:
    """The untrained pipeline. Seeds PyTorch's global generator, which initialises the weights."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "transformer": build_transformer(task),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "vae": build_vae(task),
        "text_encoder": build_text_encoder(task),
        "tokenizer": build_tokenizer(task),
        "text_encoder_2": build_text_encoder(task),
        "tokenizer_2": build_tokenizer(task),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    return StableDiffusion3Pipeline(**parts)
