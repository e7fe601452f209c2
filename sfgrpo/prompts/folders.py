"""Folders of prompts: the splits they hold, as the library `datasets` finds them.

What `load_dataset` understands (so also Flow-GRPO's `train.txt`, `test.txt` and
`train_metadata.jsonl`, `test_metadata.jsonl`) and what `save_to_disk` wrote. `datasets` says which
files belong to which split. Text, JSON, CSV and Parquet are then read by `sfgrpo.prompts.files`,
since `datasets` guesses types (a text "2024-01-15" becomes a time, "007" a number, "None" nothing);
the rest, and a folder whose card says how its files are to be read, by `datasets`. Nothing is
written into the folder: what is built on the way lies in a folder of its own, which is gone when
reading ends.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sfgrpo.prompts import files, images, rows, tables
from sfgrpo.prompts.prompt import Prompt

EVALUATION = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Splits for evaluation, the first that there is: a test set is left alone if it can be."""
DESCRIBING = {"dataset_infos.json", "dataset_info.json", "state.json"}
"""Files that say what a dataset is, and hold no prompts."""
KNOWN = {"name", "data_files", "sep", "delimiter"}
"""What `datasets` may say of how files are to be read that `sfgrpo.prompts.files` follows."""


def training(splits: Mapping[str, list[Prompt]], folder: str) -> list[Prompt]:
    """The split "train", or the only one if its name does not say evaluation.

    Raises:
        ValueError: there is none, or it is not clear which; lists what there is.
    """
    others = [name for name in splits if name not in EVALUATION]
    if "train" in splits:
        return splits["train"]
    if len(others) == 1:
        return splits[others[0]]
    raise ValueError(
        f"prompts: folder '{folder}' needs a split 'train', it has {', '.join(sorted(splits))}; "
        "or name the file to train on"
    )


def evaluation(splits: Mapping[str, list[Prompt]]) -> list[Prompt] | None:
    """The split for evaluation; None if no name says so."""
    return next((splits[name] for name in EVALUATION if name in splits), None)


def read(folder: str, *, pictures: range = images.NONE) -> dict[str, list[Prompt]]:
    """All splits of a folder, by name; rows with a blank prompt are passed over. `pictures` is how
    many images a prompt may bring.

    Raises:
        ValueError: names the folder, file or row, and what is wrong: `datasets` is missing or too
            old, nothing there that it reads, no column for the prompt, a split without a prompt.
    """
    datasets = tables.library()
    with tempfile.TemporaryDirectory(prefix="sfgrpo-") as cache, _quiet(datasets):
        try:
            found = _find(datasets, folder, cache)
        except Exception as error:  # every file format raises its own
            why = tables.reason(error)
            raise ValueError(f"prompts: folder '{folder}' cannot be read: {why}") from error
        splits = {name: _split(part, name, folder, pictures) for name, part in found.items()}
    for name, prompts in splits.items():
        if not prompts:
            raise ValueError(f"prompts: folder '{folder}', split '{name}' holds no prompt")
    return splits


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without bars of progress, which would cut through those of the run."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _find(datasets: Any, folder: str, cache: str) -> dict[str, Any]:
    """By the name of the split, a table of `datasets` or the files to read: (path, separator)."""
    path = Path(folder).absolute()  # "json", a bare word, would name a format and no folder
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _named(datasets.load_from_disk(str(path), keep_in_memory=True))
    if set(str(path)) & set("*?[]"):
        raise ValueError(
            "its path has one of * ? [ ], which datasets takes for a pattern; rename it"
        )
    config = datasets.load_dataset_builder(str(path), cache_dir=cache).config
    if not _plain(config):
        return _named(datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True))
    _tell_left_out(path, [path for part in config.data_files.values() for path in part])
    separator = getattr(config, "delimiter", None) or getattr(config, "sep", None)
    return {
        str(name): [(Path(file), separator) for file in paths]
        for name, paths in config.data_files.items()
    }


def _tell_left_out(folder: Path, read: list[str]) -> None:
    """Warn of files of prompts in a format that `datasets` passes over: it takes the one that most
    files have."""
    kinds = {files.suffixes(file)[0] for file in read}
    others = [
        str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))
        if files.readable(path.name) and files.suffixes(path.name)[0] not in kinds
        and path.name not in DESCRIBING
    ]  # fmt: skip
    if others:
        warnings.warn(
            f"prompts: of folder '{folder}' datasets reads its {', '.join(sorted(kinds))} alone, "
            f"and leaves out {rows.listed(others)}",
            stacklevel=2,
        )


def _plain(config: Any) -> bool:
    """Whether `sfgrpo.prompts.files` reads all that a builder's configuration names, as it says."""
    usual = type(config)()
    said = {f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)}
    paths = [path for part in config.data_files.values() for path in part]
    return said <= KNOWN and all(files.readable(p) and Path(p).is_file() for p in paths)


def _named(loaded: Any) -> dict[str, Any]:
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _split(part: Any, name: str, folder: str, pictures: range) -> list[Prompt]:
    if isinstance(part, list):
        return [
            prompt
            for path, separator in part
            for prompt in files.read(path, str(path), separator=separator, pictures=pictures)
        ]
    source = f"prompts: folder '{folder}', split '{name}'"
    if pictures == images.NONE:
        return tables.prompts(part, source)
    found = tables.prompts(part, source, with_images=True)
    return images.attached(found, Path(folder), pictures)
