"""JSON as people write it: a key that stands twice in one object is an error instead of the last
one winning, as in `sfgrpo.recipe_yaml`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


class RepeatedKey(ValueError):
    """A key stands twice in one object."""

    def __init__(self, key: str, within: dict[str, Any], whole: Any) -> None:
        super().__init__(f"the key {json.dumps(key)[:80]} stands twice in one object")
        self.within, self.whole = within, whole

    def item(self) -> int | None:
        """Which item of a list it is in, from 1; None if the whole is no list."""
        for number, item in enumerate(self.whole if isinstance(self.whole, list) else (), 1):
            inner = [item]
            while inner:  # no recursion: it may be nested as deeply as JSON is read
                value = inner.pop()
                if value is self.within:
                    return number
                inner += value.values() if isinstance(value, dict) else ()
                inner += value if isinstance(value, list) else ()
        return None


def read(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply.
        RepeatedKey: a key stands twice in one object.
    """
    repeated: list[tuple[str, dict[str, Any]]] = []

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((key, _),) = Counter(name for name, _ in pairs).most_common(1)
            repeated.append((key, found))
        return found

    try:
        whole = json.loads(text, object_pairs_hook=made)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if repeated:
        raise RepeatedKey(*repeated[0], whole)
    return whole
