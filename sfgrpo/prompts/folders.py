"""Folders of prompts, read with the library `datasets`: the splits they hold, as plain records.

What `load_dataset` understands (parquet, CSV, JSON, JSON lines, text; so also Flow-GRPO's
`train.txt`, `test.txt` and `train_metadata.jsonl`, `test_metadata.jsonl`) and what `save_to_disk`
wrote. No code of a dataset is run: `datasets` gave that up in its fourth version, and the ones
before are refused. Nothing is written into the folder: what is built on the way lies in a folder of
its own, which is gone when reading ends.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "caption", "text")
"""Where the prompt stands: the first of these that there is."""
EVALUATION = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Splits for evaluation, the first that there is: a test set is left alone if it can be."""
OLDEST = 4
"""The major version of `datasets` that stopped running a dataset's own code."""
NUMBERS = ("int", "uint", "float")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row: the prompt and what the other columns say about it."""

    text: str
    metadata: dict[str, Any]


def training(splits: Mapping[str, list[Record]], folder: str) -> list[Record]:
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


def evaluation(splits: Mapping[str, list[Record]]) -> list[Record] | None:
    """The split for evaluation; None if no name says so."""
    return next((splits[name] for name in EVALUATION if name in splits), None)


def read(folder: str) -> dict[str, list[Record]]:
    """All splits of a folder, by name; rows with a blank prompt are passed over.

    Columns whose values JSON can express become metadata, others (images, bytes, times) are not
    even decoded. Arrow pads rows of different keys with nulls, so null means that a key is absent.

    Raises:
        ValueError: names the folder and what is wrong: `datasets` is missing or too old, nothing
            there that it reads, no column for the prompt, a split without a prompt.
    """
    datasets = _library()
    with tempfile.TemporaryDirectory(prefix="sfgrpo-") as cache, _quiet(datasets):
        try:
            loaded = _load(datasets, folder, cache)
        except Exception as error:  # every file format raises its own
            raise ValueError(f"prompts: folder '{folder}' cannot be read: {error}") from error
        named = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        return {str(name): _records(split, name, folder) for name, split in named.items()}


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "prompts: a folder is read with the package datasets: pip install 'datasets>=5'"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise ValueError(
            f"prompts: datasets {datasets.__version__} may run code that lies in a folder: "
            "pip install 'datasets>=5'"
        )
    return datasets


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


def _load(datasets: Any, folder: str, cache: str) -> Any:
    """A dataset, or a dict of the datasets of all splits."""
    path = Path(folder).absolute()  # "json", a bare word, would name a format and no folder
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path), keep_in_memory=True)
    if set(str(path)) & set("*?[]"):
        raise ValueError(
            "its path has one of * ? [ ], which datasets takes for a pattern; rename it"
        )
    return datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)


def _records(split: Any, name: Any, folder: str) -> list[Record]:
    column = next((c for c in COLUMNS if c in split.features), None)
    where = f"prompts: folder '{folder}', split '{name}'"
    if column is None:
        raise ValueError(
            f"{where}: needs a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, "
            f"it has {', '.join(split.column_names)}"
        )
    kept = [c for c, feature in split.features.items() if c == column or _is_json(feature)]
    found = []
    for number, row in enumerate(split.select_columns(kept).with_format(None), 1):
        text = row.pop(column)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}, row {number}: '{column}' must be text, got {text!r}")
        if text and text.strip():
            found.append(Record(text=text.strip(), metadata=_without_nulls(row)))
    if not found:
        raise ValueError(f"{where} holds no prompt")
    return found


def _is_json(feature: Any) -> bool:
    """Whether values of a column's type are text, numbers, truth values, or lists or objects of
    such; told by the names of the types, so that a column of images is never opened."""
    if isinstance(feature, dict):
        return all(_is_json(inner) for inner in feature.values())
    if isinstance(feature, list):
        return all(_is_json(inner) for inner in feature)
    kind = type(feature).__name__
    if kind in ("List", "LargeList", "Sequence"):
        return _is_json(feature.feature)
    if kind == "Value":
        plain = ("string", "large_string", "bool", "null")
        return feature.dtype in plain or feature.dtype.startswith(NUMBERS)
    return kind in ("Json", "ClassLabel")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
