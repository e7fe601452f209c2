"""What a backbone's `save` wrote, given back to its network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfgrpo.backbones import _adapters

WHOLE: Mapping[str, str] = {"": "transformer"}
"""Prefix of names -> where the weights called so lie in a folder of whole weights."""


def restore(
    network: nn.Module, folder: Path, *, parts: Mapping[str, str] = WHOLE, adapters: str = ""
) -> None:
    """Read `folder`: the adapters of a network that has some, else all its weights.

    Args:
        parts: as `WHOLE`; a file, or a folder of files, for each part of the network.
        adapters: the file of adapters, where `_adapters.find` would not find it.

    Raises:
        ValueError: nothing is there, or what is there belongs to another network.
    """
    if config := getattr(network, "peft_config", None):
        found = config["default"]
        _adapters.load(network, folder / adapters, rank=found.r, alpha=found.lora_alpha)
        return
    state = {
        prefix + name: value
        for prefix, below in parts.items()
        for name, value in _read(folder / below).items()
    }
    wanted = network.state_dict()
    wrong = sorted(
        name for name in state.keys() | wanted.keys()
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape
    )  # fmt: skip
    if wrong:
        raise ValueError(
            f"'{folder}' holds the weights of another network: '{wrong[0]}' is there "
            f"{_size(state, wrong[0])}, here {_size(wanted, wrong[0])} ({len(wrong)} such)"
        )
    network.load_state_dict(state)


def _read(place: Path) -> dict[str, Tensor]:
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{place}' holds no weights (*.safetensors)")
    try:
        return {name: value for file in files for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"'{place}' cannot be read: {error}") from error


def _size(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "missing"
