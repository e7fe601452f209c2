"""Rows of any kind of file -> prompts: where the prompt stands, and what may be metadata.

The same rows give the same prompts whether they come as JSON, CSV or Parquet, alone or in a folder:
the column is found in any case and in the plural (PartiPrompts has `Prompt`, DrawBench `Prompts`),
a blank prompt is passed over, and null means that a key is absent.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from sfgrpo.prompts.prompt import Prompt

COLUMNS = ("prompt", "caption", "text")
"""Where the prompt stands: the first of these that there is."""
DEPTH = 64
"""Lists and objects in metadata nest at most so deep."""
LISTED, LONGEST = 12, 40
"""How many names a message lists, and how much of each."""
Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its values by column."""


def column(names: Iterable[str], source: str) -> str:
    """The column of the prompt.

    Raises:
        ValueError: names the source; there is none, or several in different spelling.
    """
    names = list(names)
    for wanted in COLUMNS:
        found = [name for name in names if name.strip().casefold() in (wanted, f"{wanted}s")]
        if wanted in names or len(found) == 1:
            return wanted if wanted in names else found[0]
        if found:
            raise ValueError(
                f"{source}: which is the prompt, {listed(found)}? call that column '{wanted}'"
            )
    expected = f"{', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    raise ValueError(f"{source}: needs a column {expected}, it has {listed(names)}")


def listed(names: Iterable[str]) -> str:
    """Names for a message, which stays readable however many and long they are."""
    names = list(names)
    shown = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in names[:LISTED]]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(shown) or "none") + more


def prompts(rows: Iterable[Row], name: str) -> list[Prompt]:
    """The prompts in column `name`; the other columns are their metadata.

    Raises:
        ValueError: names the row, and what is wrong with it.
    """
    found = []
    for where, row in rows:
        if name not in row:
            raise ValueError(f'{where}: expected an object with a text "{name}"')
        metadata = _clean(row, where)
        text = metadata.pop(name, None)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}: '{name}' must be text, got {reprlib.repr(text)}")
        if text and text.strip():
            found.append(Prompt(text.strip(), metadata, where))
    return found


def _clean(value: Any, where: str, depth: int = DEPTH) -> Any:
    """A value without the keys that are null; refuses what nothing behind can write or read."""
    if not depth:
        raise ValueError(f"{where}: lists or objects are nested more than {DEPTH} deep")
    if isinstance(value, str):
        return _encodable(value, where)
    if isinstance(value, Mapping):
        items = [(key, inner) for key, inner in value.items() if inner is not None]
        return {_encodable(k, where): _clean(inner, where, depth - 1) for k, inner in items}
    return [_clean(v, where, depth - 1) for v in value] if isinstance(value, list) else value


def _encodable(text: str, where: str) -> str:
    """JSON can write half of a character ("\\ud83d"), which no tokenizer takes."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where}: {half} in {ascii(text)[:80]} is half of a character") from None
    return text
