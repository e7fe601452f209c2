"""Weights of open_clip's CLIP in transformers' class.

The two name the same tensors differently; open_clip keeps query, key and value in one and its
projections transposed. Sizes are read off the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
TOWERS = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Of a layer, with weight and bias each."""


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict under transformers' names.

    Raises:
        KeyError: a name that is none of open_clip's CLIP with a transformer for either.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        owner, _, kind = name.rpartition(".")
        if name in WHOLE:
            found[WHOLE[name]] = value
        elif name in TRANSPOSED:
            found[TRANSPOSED[name]] = value.T.contiguous()
        elif owner in NORMS:
            found[f"{NORMS[owner]}.{kind}"] = value
        else:
            found |= _of_layer(name, value)
    return found


def _of_layer(name: str, value: Tensor) -> dict[str, Tensor]:
    tower = next((tower for tower in TOWERS if name.startswith(f"{tower}.")), None)
    if tower is None:
        raise KeyError(f"'{name}' is not a name of open_clip's CLIP")
    layer, _, part = name.removeprefix(f"{tower}.").partition(".")
    where = f"{TOWERS[tower]}.{layer}"
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.removeprefix("attn.in_proj_")
        three = zip("qkv", value.chunk(3), strict=True)
        return {f"{where}.self_attn.{key}_proj.{kind}": v.contiguous() for key, v in three}
    part, _, kind = part.rpartition(".")
    if part not in PARTS:
        raise KeyError(f"'{name}' is not a name of open_clip's CLIP")
    return {f"{where}.{PARTS[part]}.{kind}": value}


def settings(state: Mapping[str, Tensor], *, eos: int, heads: tuple[int, int]) -> dict[str, Any]:
    """Arguments of transformers' `CLIPConfig` for open_clip's `state`, whose activation is GELU.

    Args:
        eos: the token at whose place a text's embedding is read.
        heads: channels of one attention head of the text's and of the image's tower; nothing in
            the state tells.
    """
    length, text = state["positional_embedding"].shape
    image, _, patch, _ = state["visual.conv1.weight"].shape
    places = len(state["visual.positional_embedding"]) - 1
    towers = [
        {
            "hidden_size": width,
            "intermediate_size": len(state[f"{tower}.0.mlp.c_fc.weight"]),
            "num_attention_heads": width // head,
            "num_hidden_layers": 1 + max(_layers(state, tower)),
            "hidden_act": "gelu",
        }
        for tower, width, head in zip(TOWERS, (text, image), heads, strict=True)
    ]
    return {
        "projection_dim": state["text_projection"].shape[1],
        "text_config": {
            **towers[0],
            "vocab_size": len(state["token_embedding.weight"]),
            "max_position_embeddings": length,
            "eos_token_id": eos,
        },
        "vision_config": {
            **towers[1], "patch_size": patch, "image_size": patch * round(places**0.5)
        },
    }  # fmt: skip


def _layers(state: Mapping[str, Tensor], tower: str) -> list[int]:
    """Numbers of a tower's layers."""
    begin = f"{tower}."
    return [int(n.removeprefix(begin).partition(".")[0]) for n in state if n.startswith(begin)]
