"""Low-rank adapters as files: written so that whoever reads them gives them their full strength,
and read as the start of a run.

An adapted layer adds alpha / rank B A x. diffusers and peft find alpha beside the weights; ComfyUI,
kohya's tools and `load_lora_weights(state_dict)` do not look there and take alpha = rank. So B is
written times alpha / rank, and alpha = rank is what is said beside it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:  # peft takes seconds to import; runs that train all weights go without
    from peft import LoraConfig

DIFFUSERS, PEFT, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
PREFIXES = {DIFFUSERS: "transformer.", PEFT: "base_model.model."}
"""What the names of a network's layers are preceded by in each file."""
UNSERVED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""Settings of peft under which a layer does something else than alpha / rank B A x."""


def of(network: nn.Module) -> tuple[dict[str, Tensor], LoraConfig] | None:
    """A and B of each adapted layer and what they were made with; None of a network without."""
    config: Any = getattr(network, "peft_config", None)
    if not config:
        return None
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(network), config["default"]


def save(pipeline: Any, folder: Path, layers: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write adapters for `load_lora_weights(folder)` and for peft's `from_pretrained`.

    Args:
        pipeline: knows how its family's `save_lora_weights` is called; of one without, the file is
            for its transformer's `load_lora_adapter`.
        layers: A and B of each layer, named as in the network that the pipeline holds.
        config: what they were trained with.
    """
    said = copy.copy(config)
    said.lora_alpha, said.inference_mode = config.r, True
    if isinstance(
        config.target_modules, set
    ):  # peft's, whose order differs from process to process
        said.target_modules = sorted(config.target_modules)
    folded = at_full_strength(layers, config)
    writer = pipeline if hasattr(pipeline, "save_lora_weights") else _writer()
    writer.save_lora_weights(
        folder,
        transformer_lora_layers=dict(folded),
        transformer_lora_adapter_metadata=said.to_dict(),
    )
    said.save_pretrained(str(folder))
    named = {PREFIXES[PEFT] + name: value for name, value in folded.items()}
    save_file(named, folder / PEFT, metadata={"format": "pt"})


def _writer() -> Any:
    from diffusers.loaders.lora_pipeline import HunyuanVideoLoraLoaderMixin

    return HunyuanVideoLoraLoaderMixin  # of a transformer's adapters alone, under their own names


def at_full_strength(layers: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A and B of each layer on the CPU, B times alpha / rank: what they add is then B A x."""
    scale = config.lora_alpha / config.r
    return {
        name: (value * scale if ".lora_B." in name else value).detach().cpu().contiguous()
        for name, value in layers.items()
    }


def load(network: nn.Module, path: Path, *, rank: int, alpha: float) -> None:
    """Give the adapters of a network, of this rank and alpha, the values of a folder or file.

    Raises:
        ValueError: there is no such file, or its ranks or layers are others.
    """
    from peft.utils import get_peft_model_state_dict

    own = get_peft_model_state_dict(network)
    # What a network made of several keeps in folders of their own: prefix of names -> folder.
    parts: dict[str, str] = getattr(network, "adapter_folders", {"": ""})
    for prefix, below in parts.items():
        file = find(path / below if below else path)
        mine = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
        _fill(mine, file, rank, alpha)


def check(path: Path, rank: int) -> None:
    """ValueError unless `path` is, or holds, a file of adapters of this rank; reads no weights."""
    file = find(path)
    with _opened(file) as stored:
        layers = stored.keys()
        for name in layers:
            if ".lora_A." in name and (found := stored.get_slice(name).get_shape()[0]) != rank:
                raise ValueError(
                    f"lora.path: '{file}' holds adapters of rank {found}, lora.rank is {rank}"
                )


def find(path: Path) -> Path:
    """The file of adapters that `path` is or holds; ValueError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"lora.path: '{path}' does not exist")
    found = [path / name for name in PREFIXES if (path / name).is_file()]
    if not found:
        raise ValueError(f"lora.path: '{path}' holds neither {DIFFUSERS} nor {PEFT}")
    return found[0]


def _fill(own: Mapping[str, Tensor], file: Path, rank: int, alpha: float) -> None:
    check(file, rank)
    with _opened(file) as stored:
        settings = _settings(file, stored.metadata() or {})
        layers = stored.keys()
        names = {_plain(name, own): name for name in layers}
        for wrong, what in (
            (names.keys() - own.keys(), "has {}, which is no adapter of this recipe's network"),
            (own.keys() - names.keys(), "lacks {}, an adapter of this recipe's network"),
        ):
            if wrong:
                others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                first = f"'{min(wrong)}'{others}"
                raise ValueError(f"lora.path: '{file}' {what.format(first)}; see lora.targets")
        scale = settings.get("lora_alpha", rank) / settings.get("r", rank) * rank / alpha
        for name, value in own.items():
            given = stored.get_tensor(names[name])
            if given.shape != value.shape:
                raise ValueError(
                    f"lora.path: '{file}': '{name}' is {list(given.shape)}, here it is "
                    f"{list(value.shape)}"
                )
            with torch.no_grad():
                value.copy_(given.float() * scale if ".lora_B." in name else given)


def _plain(name: str, own: Mapping[str, Tensor]) -> str:
    """A layer's name without what files put before it."""
    prefixes = ("", *PREFIXES.values())
    options = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
    return next((option for option in options if option in own), options[-1])


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings, from where diffusers or peft keeps them; empty where nobody said any."""
    beside = file.with_name(PEFT_CONFIG)
    told = metadata.get("lora_adapter_metadata")
    if told is not None:
        prefix = PREFIXES[DIFFUSERS]
        settings = {key.removeprefix(prefix): value for key, value in json.loads(told).items()}
    elif file.name == PEFT and beside.is_file():
        settings = json.loads(beside.read_text(encoding="utf-8"))
    else:
        settings = {}
    for key in UNSERVED:
        if settings.get(key):
            raise ValueError(f"lora.path: '{file}' was made with {key}, which is not served here")
    return settings


def _opened(file: Path) -> Any:
    """The file, opened; ValueError if it is no safetensors file."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora.path: '{file}' cannot be read: {error}") from error
