"""What a family answers where there are configurations alone, no weights and no tokenizers: how
much its work is. `sfgrpo.doctor` measures memory with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from sfgrpo.backbones.base import Conditioning, Modality


class Sizes(ABC):
    """A part of `PipelineBackbone`; a family overrides what differs in its own file."""

    modality: Modality
    max_sequence_length: int
    encode_batch: ClassVar[int] = 16
    """Prompts embedded at once: language models keep the hidden states of every layer."""
    whole_sequences: ClassVar[str] = "diffusers has no plan of how its network is divided"
    """Why ranks cannot share a sequence (`sfgrpo.backbones._context`); "" where they can."""

    @property
    @abstractmethod
    def transformer(self) -> nn.Module: ...

    @abstractmethod
    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]: ...

    def _spatial(
        self, height: int, width: int, frames: int = 1, *, scale: int, multiple: int
    ) -> tuple[int, int]:
        """Latent (h, w); ValueError unless both sides are multiples of `multiple` pixels, and for
        several frames of what makes images."""
        if frames != 1 and self.modality == "image":
            raise ValueError(f"num_frames: this model makes images, got {frames} frames; use 1")
        for name, pixels in (("height", height), ("width", width)):
            if pixels < multiple or pixels % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {multiple} pixels and at least {multiple}, "
                    f"got {pixels}"
                )
        return height // scale, width // scale

    @abstractmethod
    def blank(self, prompts: int) -> Conditioning:
        """Conditioning of zeros for each prompt, as long as `max_sequence_length` allows."""

    def sequences(self, latent_shape: tuple[int, ...]) -> Mapping[str, int]:
        """Lengths of what ranks divide of a row, by what it is."""
        return {}

    def tokens_read(self, encoder: Any) -> int:
        """Tokens that one of the text encoders reads of a prompt of `max_sequence_length`: CLIP
        always its own number."""
        is_clip = "clip" in encoder.config.model_type
        return encoder.config.max_position_embeddings if is_clip else self.max_sequence_length

    def prepare_blank(self) -> Any:
        """What preparing a prompt's images makes, here and now, of blank ones."""
        return None

    def for_sizes(self) -> nn.Module:
        """The network in a form whose forward asks for no values, so that it runs on tensors that
        have none (PyTorch's meta device), and allocates what the network does."""
        return self.transformer
