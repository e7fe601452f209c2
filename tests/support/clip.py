"""A CLIP of two layers with random weights, and images to show to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from sfgrpo.embedded import architecture

SIDE = 32
WIDTH = 64
"""Length of an embedding."""


def save(path: Path) -> str:
    """The model, its tokeniser of the captions' words, and its image settings."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "text_config": architecture.build_text_encoder().config.to_dict(),
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        "projection_dim": WIDTH,
    }
    CLIPModel(CLIPConfig(**settings)).save_pretrained(path)
    architecture.build_tokenizer().save_pretrained(path)
    prepare(path)
    return str(path)


def prepare(path: Path, **changes: Any) -> None:
    """Write image settings."""
    settings: dict[str, Any] = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        **changes,
    }
    CLIPImageProcessorPil(**settings).save_pretrained(path)


def pictures(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Smooth random images in whole 255ths: what eight bits can hold."""
    noise = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    return (images * 255).round() / 255


def to_bytes(image: Tensor) -> np.ndarray:
    """[3, H, W] -> [H, W, 3] uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def embedded(folder: str, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of images and prompts, as transformers makes them of Pillow's images."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder)
    opened = [Image.fromarray(to_bytes(image)) for image in images]
    inputs = processor(
        text=prompts, images=opened, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        found = model(**inputs)
    return found.image_embeds, found.text_embeds
