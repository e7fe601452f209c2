"""Weights that are the same wherever they are made, with which published code gave its scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def filled(shapes: Shapes, *, size: float = 0.15) -> dict[str, Tensor]:
    """Numbers spread evenly over (-size, size), without a generator, whose stream may change; the
    weights of norms are around 1."""
    state = {}
    for place, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        steps = torch.arange(count, dtype=torch.float64)
        even = (torch.sin(steps * 12.9898 + place * 78.233) * 43758.5453) % 1
        state[name] = (((2 * even - 1) * size).float() + is_gain(name)).reshape(shape)
    return state


def is_gain(name: str) -> bool:
    """Whether these weights multiply what a norm made."""
    owner, _, kind = name.rpartition(".")
    last = owner.rpartition(".")[2].lower()
    return kind == "weight" and (last.startswith(("ln", "norm")) or "norm" in last)
