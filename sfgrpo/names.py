"""Error messages for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """A message that says what was given, what may have been meant, and what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.4)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return f"unknown {what} '{got}';{hint} (known: {', '.join(names)})"
