"""What the trainer needs of a generator: encode prompts, predict velocities, decode latents.

A backbone is one module of this package with a function `load(path, **options) -> Backbone`; the
module's name is the name in the configuration, so a backbone is added by adding a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the velocity network is told about each of P prompts."""

    tokens: Tensor
    """[P, L, C] text token embeddings."""
    pooled: Tensor
    """[P, E] pooled text embeddings."""

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def rows(self, index: Tensor) -> Conditioning:
        """The rows of `index` [B] int64, in its order; rows may repeat."""
        return Conditioning(
            **{f.name: getattr(self, f.name).index_select(0, index) for f in fields(self)}
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """A copy on `device`, cast to `dtype` if one is given."""
        return Conditioning(
            **{f.name: getattr(self, f.name).to(device=device, dtype=dtype) for f in fields(self)}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the prompts."""
        return Conditioning(
            **{
                f.name: torch.cat([getattr(part, f.name) for part in parts])
                for f in fields(Conditioning)
            }
        )


class Backbone(Protocol):
    """A rectified-flow generator: x_t = (1 - t) x_0 + t x_1, velocity v = x_1 - x_0."""

    @property
    def transformer(self) -> nn.Module:
        """The velocity network, the one part that is trained."""
        ...

    @property
    def device(self) -> torch.device:
        """Where encoding, velocity and decoding run."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights and of the conditioning."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the linear layers that low-rank adapters attach to."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Default (height, width) in pixels."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of one latent; ValueError for a size the model cannot make."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """The sampler's times [num_steps + 1] float32 on the CPU, descending from 1 to 0."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of P prompts, without gradient; "" is the unconditional prompt."""
        ...

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity [B, C, h, w] in float32 at latents x [B, C, h, w] and times t [B] in [0, 1].

        `transformer` is called in place of `self.transformer`, so that a wrapped module (an
        engine's, an adapter's) can be passed; differentiable with respect to its parameters.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] of latents [B, C, h, w], without gradient."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained for the stock pipeline: adapters as `load_lora_weights` reads
        them, or the whole transformer as `from_pretrained` does."""
        ...
