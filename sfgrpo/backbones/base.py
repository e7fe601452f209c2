"""What the trainer needs of a generator: encode prompts, predict velocities, decode latents.

A backbone is one module of this package with a function `load(path, **options) -> Backbone`; the
module's name is the name in the configuration, so a backbone is added by adding a file. One of
your own is named "package.module:function" (see `ModuleBackbone`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

Modality = Literal["image", "video", "other"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the names of precisions in a recipe mean."""
EXTRA = "extra."
"""What the names of `Conditioning.extra` are preceded by among those of all its tensors."""


class Negative(str):
    """A prompt that guidance leads away from: some stock pipelines read it in another way."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the velocity network is told about each of P prompts."""

    tokens: Tensor
    """[P, L, C] token embeddings, or any tensor [P, ...] that a network of one's own reads."""
    pooled: Tensor | None = None
    """[P, E] pooled text embeddings, for networks that read them."""
    mask: Tensor | None = None
    """bool [P, L], True where a token stands, padding last; None where all L stand."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """[P, ...] what else a network reads of each prompt, such as the latents of its images, under
    names of the family's own."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """All there are, by name; those of `extra` as "extra.NAME"."""
        parts = {"tokens": self.tokens, "pooled": self.pooled, "mask": self.mask}
        found = {name: part for name, part in parts.items() if part is not None}
        return found | {f"{EXTRA}{name}": part for name, part in self.extra.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of such `tensors`; KeyError without tokens."""
        names = [name for name in tensors if name.startswith(EXTRA)]
        return Conditioning(
            tokens=tensors["tokens"], pooled=tensors.get("pooled"), mask=tensors.get("mask"),
            extra={name.removeprefix(EXTRA): tensors[name] for name in names},
        )  # fmt: skip

    def rows(self, index: Tensor) -> Conditioning:
        """The rows of `index` [B] int64, in its order; rows may repeat."""
        return self._each(lambda part: part.index_select(0, index))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """A copy on `device`, its embeddings cast to `dtype` if one is given."""

        def move(part: Tensor) -> Tensor:
            return part.to(device=device, dtype=dtype if part.is_floating_point() else None)

        return self._each(move)

    def unpadded(self) -> list[Tensor]:
        """The tokens [L_p, C] of each prompt, without padding (waits for the device)."""
        if self.mask is None:
            return list(self.tokens.unbind())
        lengths = self.mask.sum(1).tolist()
        return [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    def token_mask(self) -> Tensor:
        """bool [P, L]: `mask`, also where all tokens stand, for what wants one always."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the prompts, padding tokens to the longest.

        Raises:
            ValueError: prompts have something else beside their tokens, or in other shapes.
        """
        longest = max(part.tokens.shape[1] if part.tokens.ndim > 2 else 0 for part in parts)
        parts = [part._padded(longest) for part in parts]
        if any(part.mask is not None for part in parts):
            parts = [replace(part, mask=part.token_mask()) for part in parts]
        rows = [part.tensors() for part in parts]
        kinds = [{name: list(part.shape[1:]) for name, part in row.items()} for row in rows]
        if other := [kind for kind in kinds if kind != kinds[0]]:
            raise ValueError(
                f"prompts of one batch are conditioned unlike: {other[0]} beside {kinds[0]} "
                "(the shape of each part); images of all prompts must be as many and as large"
            )
        return Conditioning.of({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning.of({name: change(part) for name, part in self.tensors().items()})

    def divisible(self, parts: int) -> Conditioning:
        """Padded to a number of tokens that `parts` divides."""
        return self._padded(math.ceil(self.tokens.shape[1] / parts) * parts)

    def _padded(self, length: int) -> Conditioning:
        missing = length - self.tokens.shape[1] if self.tokens.ndim > 2 else 0
        if not missing:
            return self
        tokens = F.pad(self.tokens, (0, 0, 0, missing))
        return replace(self, tokens=tokens, mask=F.pad(self.token_mask(), (0, missing)))


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
        """Names (ends of them) of the linear layers that low-rank adapters attach to."""
        ...

    @property
    def modality(self) -> Modality:
        """What `decode` returns; pictures are kept of images and videos alone."""
        ...

    @property
    def decode_batch(self) -> int:
        """Samples that are decoded, and scored, at once."""
        ...

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one latent; ValueError for a size the model cannot make."""
        ...

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        """The sampler's times [num_steps + 1] float32 on the CPU, descending from 1 to 0.

        Some models shift them by the number of tokens, so by the shape of the latent.
        """
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of P prompts, without gradient; what guidance leads away from, "" unless a
        recipe says otherwise, is a `Negative`."""
        ...

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity [B, ...] in float32 at latents x [B, ...] and times t [B] in [0, 1].

        Rows stand at times of their own. `transformer` is called in place of `self.transformer`,
        so that a wrapped module (an engine's, an adapter's) can be passed; differentiable with
        respect to its parameters.
        """
        ...

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """How guidance enters: the velocities that `v_uncond + scale (v - v_uncond)` is taken of,
        which the fused ops do; or the guided velocity and None, where it is another formula."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Samples of latents [B, ...], without gradient: images [B, 3, H, W] or videos
        [B, F, 3, H, W], float32 in [0, 1], or what else the model makes."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained for the stock pipeline: adapters as `load_lora_weights` reads
        them, or the whole transformer as `from_pretrained` does."""
        ...

    def restore(self, folder: Path) -> None:
        """Give the transformer what `save` wrote: adapters if it has any (`sfgrpo.policy.Policy`
        adds them), else all weights. ValueError if the folder lacks them or holds others."""
        ...


class SoundBackbone(Backbone, Protocol):
    """A generator whose videos come with sound, which its latents hold, too.

    Its `load` has the attribute `makes_sound = True`, which is asked before anything is loaded.
    """

    @property
    def sound_rate(self) -> int:
        """Samples a second of `sound`."""
        ...

    def sound(self, latents: Tensor) -> Tensor:
        """What is heard with `decode(latents)`, without gradient: float32 [B, channels, samples] in
        [-1, 1]."""
        ...


class ImageBackbone(Backbone, Protocol):
    """A generator whose prompts come with images: what is to be edited, where a video starts.

    Its `load` has the attribute `takes_images`, a range of how many a prompt may have, which is
    asked before anything is loaded. Where a range holds 0, `encode` serves prompts without any.
    """

    def encode_with_images(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]], size: tuple[int, int, int]
    ) -> Conditioning:
        """Conditioning of P prompts and their images, without gradient.

        `images` has the images of each prompt, as many and as large for all, RGB and upright;
        `size` is (height, width, frames) of the samples. The prompt may be the negative one, which
        guidance leads away from.
        """
        ...
