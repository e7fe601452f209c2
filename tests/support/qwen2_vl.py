"""A Qwen2-VL of two layers: the shapes of its weights, its configuration and its tokeniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from tests.support.filled import Shapes

WIDTH, LAYERS = 32, 2


def both(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes(words: int) -> Shapes:
    """Of a file of transformers 4, with so many words."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (words, WIDTH),
        "visual.patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14),
        **both("visual.merger.ln_q", WIDTH),
        **both("visual.merger.mlp.0", 4 * WIDTH, 4 * WIDTH),
        **both("visual.merger.mlp.2", WIDTH, 4 * WIDTH),
    }  # fmt: skip
    for layer in range(LAYERS):
        eye, text = f"visual.blocks.{layer}", f"model.layers.{layer}"
        found |= {
            **both(f"{eye}.norm1", WIDTH), **both(f"{eye}.norm2", WIDTH),
            **both(f"{eye}.attn.qkv", 3 * WIDTH, WIDTH), **both(f"{eye}.attn.proj", WIDTH, WIDTH),
            **both(f"{eye}.mlp.fc1", 2 * WIDTH, WIDTH), **both(f"{eye}.mlp.fc2", WIDTH, 2 * WIDTH),
            **both(f"{text}.self_attn.q_proj", WIDTH, WIDTH),
            **both(f"{text}.self_attn.k_proj", WIDTH // 2, WIDTH),
            **both(f"{text}.self_attn.v_proj", WIDTH // 2, WIDTH),
            f"{text}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{text}.mlp.gate_proj.weight": (48, WIDTH),
            f"{text}.mlp.up_proj.weight": (48, WIDTH),
            f"{text}.mlp.down_proj.weight": (WIDTH, 48),
            f"{text}.input_layernorm.weight": (WIDTH,),
            f"{text}.post_attention_layernorm.weight": (WIDTH,),
        }  # fmt: skip
    return found


def tokenizer(words: Sequence[str], special: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of words and signs."""
    places = {word: place for place, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    more = [*special]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", extra_special_tokens=more
    )


def config(**tokens: Any) -> Qwen2VLConfig:
    text: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 99, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]
        },
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2
    }  # fmt: skip
    return Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
