"""Files that appear whole or not at all, and are on the disk once they are there.

A file is written beside its place under a name of its own, flushed, and given its name by one
rename; then the folder's list of names is flushed, too. So neither a kill nor a machine that loses
power leaves half a file under a name that somebody reads.

`csrc/build.py` has a rename of its own: it runs where a wheel is built, without this package.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = 2**22
"""Bytes that are read at once."""
ASIDE = "writing-"
"""How the name of what is being written begins: a kill leaves it, `clean` removes it."""


LEFT = re.compile(rf"{ASIDE}[0-9a-f]{{8}}-.+", re.DOTALL)
"""The names that `replacing` gives, and no others."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under the path that the context gives; it takes the place of `path` at the end.

    An exception within the context leaves `path` as it was. The path to write to ends like `path`,
    for libraries that choose a format by it, and differs in every call, so that any number of
    processes and machines may write the same file at once: the last one's stays, whole.
    """
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{path.name}")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write(path: Path, text: str) -> None:
    """Replace a file by a complete new one of this text (UTF-8), or leave the old."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def writable(folder: Path) -> None:
    """Make the folder, write a file to it, and remove what was made again: what is in the way of
    results is said before the work for them, which may yet be refused.

    Raises:
        OSError: it cannot be made or written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        aside = folder / f"{ASIDE}{secrets.token_hex(4)}-trial"
        aside.touch()
        aside.unlink()
    finally:
        with suppress(OSError):  # somebody else may write there by now
            for place in made:
                place.rmdir()


def clean(folder: Path) -> None:
    """Remove what kills left half written in a folder (not below it) that nobody else writes to."""
    for left in folder.iterdir() if folder.is_dir() else ():
        if LEFT.fullmatch(left.name) and left.is_file():
            left.unlink()


def sha256(path: Path, seen: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 (hex) of a file's bytes; `seen` hears how many were read since it was last called."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            seen(len(block))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder, and every file and folder below it, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
