"""How many bytes a reward's networks take, by the files that they would be read from; nothing is
loaded.

What is read is what an option annotated `Weights` names (`sfgrpo.rewards._weights`), and runs in
the precision of the option `dtype`, where the option `device` says.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfgrpo.backbones.base import DTYPES
from sfgrpo.names import REWARD
from sfgrpo.rewards import _weights

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a reward takes."""

    bytes: int
    """Of its networks, as far as their files are here."""
    device: str
    """As a recipe says it: "auto", "cpu", "cuda"."""
    absent: tuple[str, ...] = ()
    """What else it would read, and is not here."""


def size(name: str, options: Mapping[str, Any]) -> Size:
    """What the reward `name` of this package takes with these options.

    Raises:
        ValueError: no reward of this name; a file that cannot be read.
    """
    build = REWARD.resolve(name)
    said = {n: p.default for n, p in inspect.signature(build).parameters.items()} | dict(options)
    dtype = DTYPES.get(said.get("dtype", ""))
    total, absent = 0, []
    for option, kind in _weights.sources(build).items():
        if kind != "weights" or not isinstance(source := said[option], str):
            continue
        place = _weights.found(source, kind)
        if place is None:
            absent.append(source)
            continue
        for file in _files(place):
            total += sum(_bytes(name, file, dtype.itemsize if dtype else None))
    return Size(bytes=total, device=str(said.get("device", "cpu")), absent=tuple(absent))


def _files(place: Path) -> list[Path]:
    """Those that transformers reads of a folder, which may hold other precisions, too."""
    if place.is_file():
        return [place]
    if (whole := place / "model.safetensors").is_file():
        return [whole]
    if (index := place / INDEX).is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [place / name for name in sorted(set(named.values()))]
    return sorted(place.glob("*.safetensors"))


def _bytes(name: str, file: Path, width: int | None) -> Iterator[int]:
    """Of each tensor; of floating-point numbers `width` an element, unless that is None."""
    if file.suffix != ".safetensors":
        for value in _weights.read(name, str(file), device="meta").values():
            yield value.numel() * (width if width and value.is_floating_point() else value.itemsize)
        return
    for entry in _header(name, file).values():
        begin, end = entry["data_offsets"]
        floating = entry["dtype"].startswith(("F", "BF"))
        yield math.prod(entry["shape"]) * width if width and floating else end - begin


def _header(name: str, file: Path) -> dict[str, Any]:
    """What the beginning of a safetensors file says of its tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"reward '{name}': '{file}' is no safetensors file")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return entries
