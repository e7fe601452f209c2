"""Files of prompts, by their suffix: text, JSON, CSV, Parquet.

    .txt              a prompt a line
    .jsonl .ndjson    a JSON object a line
    .json             the same, or a list of objects or of texts; no key twice in an object
    .csv .tsv         a header and a row a prompt
    .parquet          a table (needs the package `datasets`)

All text is UTF-8, with or without the mark that editors of Windows put first; `.gz`, `.bz2` and
`.xz` may follow. CSV knows no types: a column is of numbers, or of True and False, only if each of
its cells is written as Python writes it, so that "007" stays what it is. Only an empty cell is
null: "NA", "None" and "nan" are text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sfgrpo import json_text
from sfgrpo.prompts import images, rows, tables
from sfgrpo.prompts.prompt import Prompt
from sfgrpo.prompts.rows import Row

if TYPE_CHECKING:  # Python 3.10 has it in another module
    from importlib.resources.abc import Traversable

READERS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress,
}  # fmt: skip


def suffixes(name: str) -> tuple[str, str]:
    """The suffix that tells the format, and that of a compression ("" for none), in lower case."""
    path = PurePath(name.lower())
    return (PurePath(path.stem).suffix, path.suffix) if path.suffix in UNPACK else (path.suffix, "")


def readable(name: str) -> bool:
    """Whether a file's suffix is one of those above."""
    return suffixes(name)[0] in READERS


def read(
    path: Path | Traversable, source: str, *, separator: str | None = None,
    pictures: range = images.NONE,
) -> list[Prompt]:  # fmt: skip
    """The prompts of a file whose suffix is `readable`; rows with a blank prompt are passed over.

    Args:
        source: what messages call the file.
        separator: between the columns of CSV, in place of what the suffix says.
        pictures: how many images a prompt may bring; if none, those in the metadata stay there.

    Raises:
        ValueError: one line with the source, the line or row where there is one, and what is wrong.
    """
    found = _read(path, source, separator, with_images=pictures != images.NONE)
    if pictures == images.NONE:
        return found
    return images.attached(found, Path(str(path)).parent, pictures)


def _read(
    path: Path | Traversable, source: str, separator: str | None, *, with_images: bool
) -> list[Prompt]:
    kind, compression = suffixes(path.name)
    try:
        data = path.read_bytes()
        data = UNPACK[compression](data) if compression else data
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"prompts: '{source}' cannot be read: {error}") from error
    if kind == ".parquet":
        return tables.parquet(data, source, with_images=with_images)
    text = _decoded(data, source)
    if kind == ".txt":
        return [Prompt(line, {}, where) for where, line in _lines(text, source)]
    if kind in (".csv", ".tsv"):
        found = _csv(text, source, separator or ("\t" if kind == ".tsv" else ","))
    else:
        found = _json(text, source, lines_only=kind != ".json")
    names = dict.fromkeys(name for _, row in found for name in row)
    return rows.prompts(found, rows.column(names, source)) if found else []


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"prompts: '{source}' is not UTF-8 text, line {line} ({error})") from None


def _lines(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Where each line stands that is not blank, and what it says."""
    # Not splitlines(): JSON may hold U+2028 and its like, which end no line of the file.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield f"{source}, line {number}", line.strip()


def _json(text: str, source: str, *, lines_only: bool) -> list[Row]:
    whole = None if lines_only else _whole(text, source)
    if whole is None:
        return [_object(_parsed(line, where), where) for where, line in _lines(text, source)]
    items = [(f"{source}, item {number}", item) for number, item in enumerate(whole, 1)]
    if all(isinstance(item, str) for item in whole):
        return [(where, {"text": item}) for where, item in items]
    return [_object(item, where) for where, item in items]


def _whole(text: str, source: str) -> list[Any] | None:
    """The items of a file that is one JSON value; None if it is an object a line."""
    if text.lstrip().startswith("["):
        return _parsed(text, source)
    try:
        return [json_text.read(text)]
    except json_text.RepeatedKey as error:
        raise ValueError(f"{source}: {error}") from None
    except ValueError:
        return None


def _parsed(text: str, where: str) -> Any:
    try:
        return json_text.read(text)
    except json_text.RepeatedKey as error:
        item = error.item()
        place = where if item is None else f"{where}, item {item}"
        raise ValueError(f"{place}: {error}") from None
    except ValueError as error:  # also a number of more than 4,300 digits
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected an object with a text "{rows.COLUMNS[0]}"')
    return where, value


def _csv(text: str, source: str, separator: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    places, cells, end = [], [], 0
    try:
        for row in reader:
            if row:
                places.append(f"{source}, line {end + 1}")
                cells.append(row)
            end = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{source}, line {end + 1}: not valid CSV ({error})") from None
    if not cells:
        return []
    header, *body = cells
    if len(set(header)) < len(header):
        twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        raise ValueError(f"{places[0]}: there are several columns {rows.listed(twice)}")
    for where, row in zip(places[1:], body, strict=True):
        if len(row) > len(header):
            raise ValueError(
                f"{where}: {len(row)} cells for {len(header)} columns; a cell with "
                f"{separator!r} in it stands in double quotes"
            )
    padded = [[cell or None for cell in row] + [None] * (len(header) - len(row)) for row in body]
    columns = [_typed(list(column)) for column in zip(*padded, strict=True)]
    values = zip(*columns, strict=True) if columns else ()
    return [
        (where, dict(zip(header, row, strict=True)))
        for where, row in zip(places[1:], values, strict=True)
    ]


def _typed(cells: list[str | None]) -> list[Any]:
    """A column as numbers or truth values if its cells are nothing else, otherwise as text."""
    for kind in (_number, {"True": True, "False": False}.__getitem__):
        try:
            return [None if cell is None else kind(cell) for cell in cells]
        except (ValueError, KeyError):
            continue
    return cells


def _number(cell: str) -> int | float:
    """The number that Python writes like the cell; ValueError if there is none."""
    for kind in (int, float):
        try:
            value = kind(cell)
        except ValueError:
            continue
        if str(value) == cell and math.isfinite(value):
            return value
    raise ValueError(cell)
