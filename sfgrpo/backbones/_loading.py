"""From a pipeline's folder to a pipeline, without the parts that are not wanted."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from accelerate import init_empty_weights
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from sfgrpo import backbones
from sfgrpo.backbones import _processors

TextEncoders = Literal["resident", "offload", "absent", "only"]
Weights = Literal["device", "host", "absent"]
LEFT_OUT = {"absent": ("text_encoder",), "only": ("transformer", "vae")}
"""How the names of parts begin that are not loaded."""


class Family(Protocol):
    """What is asked of a family's class (`sfgrpo.backbones._pipeline`)."""

    pipeline_classes: ClassVar[tuple[type[DiffusionPipeline], ...]]
    reads_as: ClassVar[Mapping[str, type[DiffusionPipeline]]]
    decoders: ClassVar[tuple[str, ...]]
    left_out: ClassVar[Mapping[str, tuple[str, ...]]]


def read(
    family: type[Family],
    path: str | Path,
    dtype: torch.dtype,
    text_encoders: TextEncoders,
    options: dict[str, Any],
    *,
    weights: Weights = "device",
) -> Any:
    """A pipeline of one of the family's classes, its decoder in float32, its networks on the meta
    device where their `weights` are "absent".

    Raises:
        OSError: says where a folder or id was looked for.
        ValueError: the folder holds another kind of pipeline; names the backbone that serves it.
    """
    index: Any = DiffusionPipeline.load_config(path, **options)
    name = index["_class_name"]
    made: Any = family.reads_as.get(name) or _class_of(name, family.pipeline_classes, path)
    # A part saved as None (SD3 without T5) has to be passed as None.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    if left_out := family.left_out.get(text_encoders):
        absent |= {name: None for name in index if name.startswith(left_out)}
    if weights == "absent":
        absent |= {
            name: _bare(entry, path, name, dtype, options)
            for name, entry in index.items()
            if name.startswith("transformer") and entry != [None, None]
        }
    ready = _processors.ready(path, index, options)
    # Another class than the folder names is no argument; a pipeline may ask the others at once.
    known = {n: p if type(p).__name__ == index[n][1] else None for n, p in ready.items()}
    given = {**absent, **known, **options}
    dtypes = {"default": dtype, **dict.fromkeys(family.decoders, torch.float32)}
    pipeline = made.from_pretrained(path, dtype=dtypes, **given)
    pipeline.register_modules(**ready)
    return pipeline


def _bare(
    entry: Sequence[str], path: str | Path, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> nn.Module:
    """A part as `from_pretrained` makes it before it reads weights; `entry` is (library, class)."""
    library, kind = entry
    made: Any = getattr(importlib.import_module(library), kind)
    config = made.load_config(path, subfolder=name, **options)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tables that a network computes for itself follow it
    try:
        with init_empty_weights():
            return made.from_config(config).eval()
    finally:
        torch.set_default_dtype(kept)


def place(pipeline: Any, device: torch.device, *, stay: Sequence[nn.Module]) -> None:
    """Move a pipeline's parts to the device, except those that `stay`."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not any(part is other for other in stay):
            part.to(device)


def _class_of(
    name: str, classes: Sequence[type[DiffusionPipeline]], path: str | Path
) -> type[DiffusionPipeline]:
    found = {made.__name__: made for made in classes}
    if name in found:
        return found[name]
    serving = [f for f in backbones.available() if name in backbones.pipelines(f)]
    hint = f"use '{serving[0]}'" if serving else "no backbone of this package serves it"
    wanted = " or ".join(found)
    raise ValueError(f"model.backbone: '{path}' holds a {name}, not a {wanted}; {hint}")


def compile_blocks(network: Any) -> None:
    """Mark a diffusers transformer's repeated blocks for torch.compile, at their first call."""
    kinds = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", ())
    blocks = [module for module in network.modules() if type(module).__name__ in (kinds or ())]
    if not blocks:
        raise ValueError(
            f"model.compile_blocks: {type(network).__name__} names no repeated blocks; use false"
        )
    for block in blocks:
        block.compile()
