"""Tables that the library `datasets` reads: Parquet files, saved datasets, images with captions.

No code of a dataset is run: `datasets` gave that up in its fourth version, and the ones before are
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sfgrpo.names import in_one_line
from sfgrpo.prompts import images, rows
from sfgrpo.prompts.prompt import Prompt
from sfgrpo.prompts.rows import Row

OLDEST = 4
"""The major version of `datasets` that stopped running a dataset's own code."""
LISTS = ("List", "LargeList", "Sequence")
NUMBERS = ("int", "uint", "float")
REASON = 300
"""How much of another library's message is passed on."""


def library() -> Any:
    """The package `datasets`; ValueError says what to install."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "prompts: folders and Parquet files are read with the package datasets: "
            "pip install 'datasets>=5'"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        raise ValueError(
            f"prompts: datasets {datasets.__version__} may run code that lies in a folder: "
            "pip install 'datasets>=5'"
        )
    return datasets


def reason(error: Exception) -> str:
    """What another library says went wrong, in one line of bounded length."""
    text = in_one_line(error) or type(error).__name__
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def parquet(data: bytes, source: str, *, with_images: bool = False) -> list[Prompt]:
    """The prompts of a Parquet file, see `prompts`.

    Raises:
        ValueError: names the source and what is wrong.
    """
    datasets = library()
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read()
        whole = datasets.Dataset(datasets.table.InMemoryTable(table))
    except Exception as error:  # pyarrow's own, and whatever a damaged schema leads to
        raise ValueError(f"prompts: '{source}' cannot be read: {reason(error)}") from error
    return prompts(whole, source, with_images=with_images)


def prompts(table: Any, source: str, *, with_images: bool = False) -> list[Prompt]:
    """The prompts of a table of `datasets`.

    Columns whose values JSON can express become metadata, others (images, bytes, times) are not
    even decoded; `with_images` the column "image" becomes what `sfgrpo.prompts.images` opens. Arrow
    pads rows of different keys with nulls, so null means that a key is absent.

    Raises:
        ValueError: names the source, and the row where there is one.
    """
    name = rows.column(table.column_names, source)
    kept = [c for c, feature in table.features.items() if c == name or _is_json(feature)]
    pictured = with_images and images.KEY in table.features and images.KEY not in kept
    if pictured:
        kept.append(images.KEY)
        table = table.cast_column(images.KEY, _undecoded(table.features[images.KEY], source))
    found = list(_rows(table.select_columns(kept).with_format(None), source))
    if pictured:
        found = [(w, {**row, images.KEY: images.inline(row[images.KEY])}) for w, row in found]
    return rows.prompts(found, name)


def _undecoded(feature: Any, source: str) -> Any:
    """The type of a column of images, or of lists of them, that leaves them as they are stored."""
    datasets = library()
    is_list = type(feature).__name__ in LISTS
    inner = feature.feature if is_list else feature
    is_stored = isinstance(inner, dict) and inner.keys() == {"bytes", "path"}
    if not is_stored and not isinstance(inner, datasets.Image):
        raise ValueError(
            f"{source}: column '{images.KEY}' holds {type(inner).__name__}, not images or paths"
        )
    bare = datasets.Image(decode=False)
    return datasets.List(bare) if is_list else bare


def _rows(table: Any, source: str) -> Iterator[Row]:
    values = iter(table)
    for number in range(1, len(table) + 1):
        where = f"{source}, row {number}"
        try:
            yield where, next(values)
        except UnicodeDecodeError as error:  # Arrow looks at text when a row is asked for
            raise ValueError(f"{where}: not UTF-8 text ({error})") from None


def _is_json(feature: Any) -> bool:
    """Whether values of a column's type are text, numbers, truth values, or lists or objects of
    such; told by the names of the types, so that a column of images is never opened."""
    if isinstance(feature, dict):
        return all(_is_json(inner) for inner in feature.values())
    if isinstance(feature, list):
        return all(_is_json(inner) for inner in feature)
    kind = type(feature).__name__
    if kind in LISTS:
        return _is_json(feature.feature)
    if kind == "Value":
        plain = ("string", "large_string", "bool", "null")
        return feature.dtype in plain or feature.dtype.startswith(NUMBERS)
    return kind in ("Json", "ClassLabel")
