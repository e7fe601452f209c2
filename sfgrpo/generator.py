"""A recipe's generator: which options of a backbone its keys are."""

from __future__ import annotations

from typing import Any

import torch

from sfgrpo import backbones
from sfgrpo.backbones.base import DTYPES
from sfgrpo.config import Recipe

PIPELINE = (
    "max_sequence_length", "attention", "compile_blocks", "decode_batch", "vae_tiling",
    "vae_slicing", "text_encoders",
)  # fmt: skip
"""Keys of `model` that are options of every family; their names are the same."""


def options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to its backbone's `load` beside path and device; to a backbone of one's
    own, the dtype alone."""
    model = recipe.model
    found: dict[str, Any] = {"dtype": DTYPES[model.dtype]}
    if ":" not in model.backbone:
        found |= {name: getattr(model, name) for name in PIPELINE}
        found["embedded_guidance"] = recipe.sample.embedded_guidance
    return found


def load(recipe: Recipe, device: torch.device | str, **instead: Any) -> backbones.Backbone:
    """The recipe's backbone; `instead` are options that replace the recipe's or add to them.

    Raises:
        OSError: says where a folder or Hub id was looked for.
        ValueError: options that the model or the device cannot serve, naming the key.
    """
    given = {**options(recipe), "device": device, **instead}
    model = recipe.model
    return backbones.load(model.backbone, model.path, options=model.options, **given)
