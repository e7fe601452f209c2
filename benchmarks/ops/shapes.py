"""Sizes the ops meet in practice: a batch of latents per model, and rewards of whole iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """``batch`` samples of shape ``sample``; for rewards, P groups of ``(N, T + 1)``."""

    name: str
    batch: int
    sample: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        return (self.batch, *self.sample)

    @property
    def elements(self) -> int:
        return math.prod(self.size)


SD3_512 = Shape("SD3.5 512px", 16, (16, 64, 64))
SD3_1024 = Shape("SD3.5 1024px", 8, (16, 128, 128))
FLUX = Shape("FLUX 1024px", 8, (4096, 64))
WAN = Shape("Wan video", 2, (16, 21, 60, 104))
ACTION = Shape("action head", 4096, (56,))
EMBEDDED = Shape("embedded", 96, (4, 8, 8))

LATENTS = (SD3_512, SD3_1024, FLUX, WAN, ACTION, EMBEDDED)
"""FLUX packs 2 x 2 patches of 16 channels into a token of 64; Wan: 81 frames of 480 x 832."""

REWARDS = (
    Shape("48x24x11", 48, (24, 11)),
    Shape("512x64x41", 512, (64, 41)),
    Shape("embedded 8x12x11", 8, (12, 11)),
)
"""Flow-GRPO's recipe for SD3.5, a large one, the embedded model's."""


@dataclass(frozen=True)
class Precision:
    """Dtype of the velocities; latents and everything per row are float32 throughout."""

    name: str
    v: torch.dtype


FP32 = Precision("fp32", torch.float32)
BF16 = Precision("bf16 v", torch.bfloat16)
"""What training in bfloat16 has: the network's output in bf16, the sampler's latents in fp32."""
