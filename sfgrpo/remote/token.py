"""The secret that client and server share: of an environment variable or a file, never of a command
line, a recipe or a URL, which others read and logs keep."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SFGRPO_REWARD_TOKEN"
SHORTEST = 16
"""Characters; `openssl rand -hex 32` gives 64."""


def read(*, file: str | Path | None = None, variable: str = VARIABLE) -> str | None:
    """The token of `file`, else that of the environment `variable`; None if neither is set.

    Raises:
        ValueError: it is no token; the message says where it stands, not what it is.
        OSError: the file cannot be read.
    """
    if file is not None:
        return _checked(Path(file).expanduser().read_text(encoding="utf-8"), f"token file '{file}'")
    if variable in os.environ:
        return _checked(os.environ[variable], f"environment variable {variable}")
    return None


def _checked(text: str, where: str) -> str:
    found = text.strip()
    if len(found) < SHORTEST or not all("!" <= char <= "~" for char in found):
        raise ValueError(
            f"{where}: a token is at least {SHORTEST} visible ASCII characters without spaces, as "
            "`openssl rand -hex 32` prints"
        )
    return found
