"""Weights of the rewards that have a network: where they are, and how a file of them is read.

An option of a `build` that is annotated `Weights` or `Settings` says where something is to be found
that may have to be downloaded, so that `sfgrpo doctor` can look for it without loading anything,
and say how much memory it takes (`sfgrpo.rewards._sizes`).
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from sfgrpo.backbones.base import DTYPES
from sfgrpo.names import REWARD, in_one_line

Weights = Annotated[str, "weights"]
"""A local folder or the hub id of a model in safetensors; or a file, local or "owner/name/file"."""
Settings = Annotated[str, "settings"]
"""A local folder or the hub id of a tokeniser, of an image processor, or of both."""

READABLE = (".safetensors", ".pt", ".pth", ".bin")
"""Suffixes of a single file of weights."""


@dataclass(frozen=True)
class Place:
    """Where the network of a reward runs, in which precision, and how many inputs at once."""

    reward: str
    device: torch.device
    dtype: torch.dtype
    batch: int

    @classmethod
    def of(cls, reward: str, *, device: str, dtype: str, batch: int) -> Place:
        """From a recipe's values ("auto" is this rank's GPU, or the CPU where there is none);
        ValueError names the one that makes no sense."""
        if dtype not in DTYPES:
            raise ValueError(
                f"reward '{reward}': dtype must be one of {list(DTYPES)}, got {dtype!r}"
            )
        if batch < 1:
            raise ValueError(f"reward '{reward}': batch must be at least 1, got {batch}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"reward '{reward}': device must be 'auto', 'cpu', 'cuda' or the like, got "
                f"{device!r}"
            ) from error
        return cls(reward, found, DTYPES[dtype], batch)

    def settle(self, network: Any) -> Any:
        """The network here, in this precision, for use alone."""
        return network.to(self.device, self.dtype).eval().requires_grad_(False)

    def batches(self, count: int) -> Iterator[slice]:
        """Slices of at most `batch` of `count` inputs."""
        return (slice(start, start + self.batch) for start in range(0, count, self.batch))


def read(reward: str, source: str, *, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict in a file of weights; on the device "meta" a pickle's has shapes alone.

    Pickles are read with nothing allowed in them but tensors and plain containers; the dictionary
    under "state_dict", if there is one, is what counts.

    Args:
        source: a local file, or "owner/name/file" on the hub.

    Raises:
        ValueError: it holds no state dict, or something that only running code could unpack.
        OSError: there is no such file, or it cannot be downloaded.
    """
    path = fetched(reward, source)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"reward '{reward}': '{source}' cannot be read: {error}") from error
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise ValueError(
            f"reward '{reward}': '{source}' is no pickle of tensors alone, which is all that is "
            f"read of one: {str(error).splitlines()[0]}"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"reward '{reward}': '{source}' is no state dict")
    return dict(found)


def fit(reward: str, source: str, network: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state`, which must be what `network` has, no less and no more, in name and shape.

    Raises:
        ValueError: it is not; names the first entry that differs.
    """
    expected = network.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        here, there = expected.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (here, there)]
            raise ValueError(
                f"reward '{reward}': '{source}' does not fit: '{name}' should be of shape "
                f"{shapes[0]}, is {shapes[1]}"
            )
    network.load_state_dict(dict(state))


def assemble(
    place: Place, source: str, kind: Any, config: Any, state: Mapping[str, Tensor], **options: Any
) -> Any:
    """A network of transformers' class `kind` with the weights `state`, all of them, and no others.

    Args:
        source: what messages call the weights.
        options: further arguments of the class.

    Raises:
        ValueError: they do not fit; names the first entry that does not.
    """
    network, found = kind.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=place.dtype, output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    wrong = {
        "is missing": found["missing_keys"],
        "belongs to nothing": found["unexpected_keys"],
        "has another shape": {name for name, *_ in found["mismatched_keys"]},
    }
    for how, names in wrong.items():
        if names:
            raise ValueError(
                f"reward '{place.reward}': '{source}' does not fit: '{min(names)}' {how}"
            )
    return network


@dataclass(frozen=True)
class Missing:
    """Weights or settings that a reward needs and this machine lacks."""

    option: str
    source: str
    wrong: str
    """What is wrong with the source, as the end of a sentence about it."""
    downloadable: bool
    """Whether it names something on the hub."""


def missing(name: str, options: Mapping[str, Any]) -> list[Missing]:
    """What the reward `name` would have to load with these options, and is not here; nothing is
    loaded.

    Raises:
        ValueError: as `rewards.build` for the name.
    """
    build = REWARD.resolve(name)
    found = []
    for option, kind in sources(build).items():
        default = inspect.signature(build).parameters[option].default
        source = options.get(option, default)
        if isinstance(source, str) and (wrong := _absent(source, kind)):
            found.append(Missing(option, source, *wrong))
    return found


def unreadable(name: str, options: Mapping[str, Any], error: OSError) -> str:
    """What a reward that could not be built lacks, in one line: the libraries that load weights
    say in several that they found none, and some of them not of which model."""
    said = in_one_line(error)
    if said.startswith("reward "):
        return said
    absent = [] if ":" in name else missing(name, options)  # which options of one's own, none knows
    gone = "; ".join(f"{it.option} '{it.source}' {it.wrong}" for it in absent)
    return f"reward '{name}': {gone}: {said}" if gone else f"reward '{name}': {said}"


def sources(build: Any) -> dict[str, str]:
    """Options of a `build` that say where something is -> which of the two kinds."""
    found = {}
    for option, hint in typing.get_type_hints(build, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):  # of "Settings | None", too
            if part in (Weights, Settings):
                found[option] = typing.get_args(part)[1]
    return found


def _absent(source: str, kind: str) -> tuple[str, bool] | None:
    """What is wrong with a source, and whether a download could help; None if nothing."""
    if found(source, kind):
        return None
    if Path(source).expanduser().is_dir():
        return "has no safetensors", False
    if split(source)[0] is None:
        return "does not exist", False
    return "is not in the hub's cache here", True


def found(source: str, kind: str) -> Path | None:
    """The file or folder of a source here, None if there is none; nothing is downloaded."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path if _complete(path, kind) else None
    repository, file = split(source)
    if repository is None:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    if file:
        cached = try_to_load_from_cache(repository, file)
        return Path(cached) if isinstance(cached, str) else None
    folder = Path(constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"))
    snapshots = sorted(folder.glob("snapshots/*"))
    return next((snapshot for snapshot in snapshots if _complete(snapshot, kind)), None)


def _complete(folder: Path, kind: str) -> bool:
    """Whether a folder has what a model, or settings, take."""
    return next(folder.glob("*.safetensors" if kind == "weights" else "*.json"), None) is not None


def split(source: str) -> tuple[str | None, str]:
    """The hub's repository and the file in it; None and "" if it names neither."""
    parts = source.split("/")
    if source.startswith(("/", ".", "~")) or "" in parts or len(parts) == 1:
        return None, ""
    file = "/".join(parts[2:])
    if not file and parts[-1].endswith(READABLE):
        return None, ""
    return "/".join(parts[:2]), file


def fetched(reward: str, source: str) -> Path:
    """A file, local or "owner/name/file" on the hub; OSError if there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    repository, file = split(source)
    if repository is None or not file:
        raise FileNotFoundError(
            f"reward '{reward}': no file '{source}', nor is it 'owner/name/file' of the hub"
        )
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))
