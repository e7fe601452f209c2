"""Latents as image tokens: their packing and places, and schedules that depend on their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACK, UNPACK = "b c (h p) (w q) -> b (h w) (c p q)", "b (h w) (c p q) -> b c (h p) (w q)"
"""Latents as tokens of 2 x 2 patches, and back."""


def dynamic_shift(scheduler: Any, tokens: int, line: Callable[..., float]) -> float | None:
    """The `mu` of a schedule that shifts by the number of image tokens, None for other schedules.

    `line` is the pipeline's own `calculate_shift`, which knows the defaults."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    names = ("base_seq_len", "max_seq_len", "base_shift", "max_shift")
    given = {name: config[key] for name, key in zip(names, keys, strict=True) if key in config}
    return line(tokens, **given)


def places(h: int, w: int, *, columns: int, device: torch.device) -> Tensor:
    """Where each of h w image tokens stands, [h w, columns]: its row and column in columns 1 and 2
    (FLUX's rotary embeddings); made on the device, so that no forward waits for a copy."""
    place = torch.zeros(h, w, columns, dtype=torch.float32, device=device)
    place[..., 1] = torch.arange(h, device=device)[:, None]
    place[..., 2] = torch.arange(w, device=device)
    return place.flatten(0, 1)
