"""ImageReward: what people prefer (Xu et al. 2023, arXiv 2304.05977).

BLIP reads the prompt with its eyes on the image (ViT-L/16 and a BERT with cross attention); five
linear layers make a number of its first token's state, and the score is that, less the mean 0.167,
over the standard deviation 1.033 of the published training data: mostly -2 to 2.

The published pickle is loaded into transformers' BLIP classes. Images [B, 3, H, W] in [0, 1] are
prepared as by torchvision from Pillow's (the shorter side to 224 pixels, bicubic; the centre cut
out), but for its rounding to 8 bits. Prompts are cut after 35 tokens. Code and weights: Apache-2.0;
BLIP's: BSD-3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfgrpo.rewards import _weights
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, Preprocess
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.aesthetic import linear_layers
from sfgrpo.rewards.base import Metadata

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
HEAD = 64
"""Channels of one attention head, of ViT-L and of BERT's base."""
PARTS = {"blip.visual_encoder.": "image", "blip.text_encoder.": "text", "mlp.layers.": "head"}
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Published, and without part in the score."""
VIT = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Names of the published image tower -> transformers'."""


def divide(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The published state dict in its three parts, under transformers' names.

    Raises:
        KeyError: a name that is none of ImageReward's.
    """
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in PARTS.values()}
    for name, value in state.items():
        if name.startswith(UNUSED) or name.endswith("position_ids"):
            continue
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        if prefix is None:
            raise KeyError(f"'{name}' is not a name of ImageReward's")
        short = name.removeprefix(prefix)
        parts[PARTS[prefix]][_of_vit(short) if PARTS[prefix] == "image" else short] = value
    return parts


def _of_vit(name: str) -> str:
    if name in VIT:
        return VIT[name]
    owner, _, kind = name.rpartition(".")
    begin = ""
    if owner.startswith("blocks."):
        _, layer, owner = owner.split(".", 2)
        begin = f"encoder.layers.{layer}."
    if owner not in VIT:
        raise KeyError(f"'{name}' is not a name of ImageReward's image tower")
    return f"{begin}{VIT[owner]}.{kind}"


def towers(place: Place, source: str, parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, Any]:
    """transformers' image tower and text encoder with the published weights.

    Raises:
        KeyError: an entry is missing that tells a size.
        ValueError: the weights do not fit.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    image, text = parts["image"], parts["text"]
    width, _, patch, _ = image["embeddings.patch_embedding.weight"].shape
    places = image["embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=width, num_attention_heads=width // HEAD, num_hidden_layers=_layers(image),
        intermediate_size=len(image["encoder.layers.0.mlp.fc1.weight"]), patch_size=patch,
        image_size=patch * round(places**0.5), layer_norm_eps=1e-6, hidden_act="gelu",
    )  # fmt: skip
    words, hidden = text["embeddings.word_embeddings.weight"].shape
    reader = BlipTextConfig(
        vocab_size=words, hidden_size=hidden, encoder_hidden_size=width,
        num_attention_heads=hidden // HEAD, num_hidden_layers=_layers(text),
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
    )  # fmt: skip
    eyes = _weights.assemble(place, source, BlipVisionModel, vision, image)
    return eyes, _weights.assemble(
        place, source, BlipTextModel, reader, text, add_pooling_layer=False
    )


def _layers(state: Mapping[str, Tensor]) -> int:
    """How many layers there are in "encoder.layers.N...", or "encoder.layer.N..."."""
    return 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder."))


class ImageReward:
    """Linear layers over what BLIP makes of prompt and image."""

    def __init__(
        self, place: Place, *, eyes: Any, reader: Any, head: nn.Module, tokenizer: Any
    ) -> None:
        self._place = place
        self._eyes, self._reader = place.settle(eyes), place.settle(reader)
        self._head = head.to(place.device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        side = eyes.config.image_size
        self._preprocess = Preprocess(
            shortest=side, crop=(side, side), mean=CLIP_MEAN, std=CLIP_STD, rounds=True
        )

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        parts = [
            self._scores(images[rows], list(prompts[rows]))
            for rows in self._place.batches(len(images))
        ]
        return torch.cat(parts) if parts else torch.empty(0, device=self._place.device)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Warn of prompts whose end the model will not see."""
        texts = list(dict.fromkeys(prompts))
        cut = sum(len(self._tokenizer(text)["input_ids"]) > TOKENS for text in texts)
        if cut:
            warnings.warn(
                f"reward 'imagereward': {cut} of {len(texts)} prompts are longer than the {TOKENS} "
                "tokens that the model reads; their ends do not count",
                stacklevel=2,
            )

    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self._preprocess(images.detach().to(self._place.device))
        seen = self._eyes(pixel_values=pixels.to(self._place.dtype)).last_hidden_state
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._place.device)
        read = self._reader(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones_like(seen[..., 0], dtype=torch.long),
        )  # fmt: skip
        return (self._head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


def build(
    *,
    model: Weights = "THUDM/ImageReward/ImageReward.pt",
    tokenizer: Settings = "google-bert/bert-base-uncased",
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> ImageReward:
    """The ImageReward reward.

    Args:
        model: a local file or "owner/name/file" on the hub: the published pickle, or safetensors.
        tokenizer: local folder or hub id of BERT's tokeniser.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of BLIP; the linear layers and scores are fp32.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, or weights that do not fit, naming them.
        OSError: where a file cannot be found.
    """
    from transformers import AutoTokenizer

    place = Place.of("imagereward", device=device, dtype=dtype, batch=batch)
    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    try:
        parts = divide(_weights.read("imagereward", model))
        eyes, reader = towers(place, model, parts)
    except KeyError as error:
        raise ValueError(
            f"reward 'imagereward': '{model}' is not ImageReward's: {error.args[0]}"
        ) from error
    head = linear_layers(reader.config.hidden_size)
    _weights.fit("imagereward", model, head, parts["head"])
    return ImageReward(place, eyes=eyes, reader=reader, head=head, tokenizer=words)
