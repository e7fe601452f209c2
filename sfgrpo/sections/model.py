"""The generator and what is trained of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sfgrpo import names
from sfgrpo.sections.base import Count, Folder, Pixels, Section, Source, both_sides


class Model(Section):
    backbone: str = "sd3"
    """A file in sfgrpo/backbones: which family of pipelines `path` holds; or "module:function",
    a backbone of your own."""
    options: dict[str, Any] = Field(default={})
    """Arguments of the backbone's `load` that no other key sets."""
    path: Source = "embedded"
    """Local folder or hub id of a diffusers pipeline; "embedded" and "numbers" are
    models in this package."""
    resolution: Pixels = 32
    """Pixels: the side of square images, or [height, width]."""
    image_resolution: Pixels | None = None
    """Pixels that prompts' images are resized to, as `resolution`, whatever their proportions; null
    is what the stock pipeline does."""
    num_frames: Count = 1
    """Frames of a video; 1 for images."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network in sampling and training; latents and densities stay fp32."""
    max_sequence_length: int | None = Field(default=None, ge=0, lt=2**31)
    """Tokens of the prompt embedding (of T5, where CLIP reads it, too); null is the stock
    pipeline's number, 0 is for Stable Diffusion 3 without T5."""
    text_encoders: Literal["resident", "offload"] = "resident"
    """Where the text encoders are while they do not embed: on the device, or in main memory."""
    prompt_cache: Folder | None = None
    """Folder of prompt embeddings, keyed by their content. All prompts of a run are embedded before
    the network is loaded, then the text encoders leave memory; where all is there already they are
    not loaded."""
    attention: str = "auto"
    """diffusers' attention backend: "native", "xformers", "flash", "_flash_3", ...; "auto" takes
    what is installed and serves the network. One that cannot serve is an error."""
    context_parallel: Count = 1
    """Ranks that share each sequence, in sampling and training, where one sample is too long for a
    device: trajectories are divided over ranks / context_parallel groups, which is to be a whole
    number, as are tokens and attention heads over the ranks of a group. For flux, flux2, qwenimage,
    wan and wan_i2v: see `sfgrpo.backbones._context`. `sfgrpo evaluate` computes sequences whole."""
    compile_blocks: bool = False
    """torch.compile the network's repeated blocks; not at ZeRO stage 3, nor with
    context_parallel."""
    decode_batch: Count | None = None
    """Samples decoded and scored at once; null is 64 images or one video."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory at large sizes, faint seams."""
    vae_slicing: bool = False
    """Decode one sample after the other."""

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        names.BACKBONE.check(name)
        return name

    @model_validator(mode="after")
    def _serves(self) -> Model:
        if self.prompt_cache is not None and ":" in self.backbone:
            raise ValueError("prompt_cache: only backbones of this package have text encoders")
        if self.context_parallel > 1 and ":" in self.backbone:
            raise ValueError(
                "context_parallel: of a network of your own it is not known how a sequence is "
                "shared; use 1"
            )
        if self.context_parallel > 1 and self.compile_blocks:
            raise ValueError(
                "context_parallel: does not go with compile_blocks: ranks exchange tokens within "
                "the blocks; use 1, or compile_blocks false"
            )
        return self

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, frames)."""
        return *both_sides(self.resolution), self.num_frames

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of prompts' images; None for the stock pipeline's."""
        return None if self.image_resolution is None else both_sides(self.image_resolution)


class Lora(Section):
    rank: Count = 32
    """At most the smaller side of the widest layer that gets adapters."""
    alpha: Count = 64
    targets: tuple[str, ...] | None = None
    """Ends of the names of the linear layers that get adapters; null is the backbone's own list."""
    path: Folder | None = None
    """Adapters to start from, of the same rank and layers: an exported folder, or a file of
    diffusers or peft; null starts from none. The reference of `train.beta` is the network without
    adapters all the same, as in Flow-GRPO."""
