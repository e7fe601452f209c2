"""Hashes of files by all their bytes, remembered for as long as a file stays as it is.

A sample of a large file misses an edit of one matrix, and hashing tens of gigabytes at every start
takes minutes. So each file's hash is kept under what it cannot change without: its path, size,
times of change and inode.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sfgrpo import files

SLOW = 2**28
"""Bytes from which hashing takes so long that it is shown."""
SETTLED = 2 * 10**9
"""Nanoseconds for which a file has to have been as it is: clocks of file systems are coarse, so
that a change right after another may leave all its times equal."""


def of_files(
    folder: Path, paths: Sequence[Path], *, memory: Path | None = None, quiet: bool = False
) -> str:
    """SHA-256 of the names (within `folder`) and bytes of files, in their order.

    `memory` is a folder for the hashes of single files; `quiet` shows no progress.
    """
    places = {path: memory / _key(path) if memory else None for path in paths}
    missing = [path for path, place in places.items() if place is None or not place.is_file()]
    size = sum(path.stat().st_size for path in missing)
    digest = hashlib.sha256()
    with tqdm(
        total=size, desc="hashing text encoders", unit="B", unit_scale=True,
        disable=quiet or size < SLOW,
    ) as bar:  # fmt: skip
        for path, place in places.items():
            if place is not None and path not in missing:
                found = place.read_text(encoding="utf-8")
            else:
                found = files.sha256(path, bar.update)
                if place is not None:
                    _remember(path, place, found)
            digest.update(f"{path.relative_to(folder)} {found}\n".encode())
    return digest.hexdigest()


def _key(path: Path) -> str:
    state = path.stat()
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    return hashlib.sha256(json.dumps([str(path.resolve()), *facts]).encode()).hexdigest()


def _remember(path: Path, place: Path, found: str) -> None:
    """Keep a hash, unless the file changed while it was read or too shortly before."""
    state = path.stat()
    changed = max(state.st_mtime_ns, state.st_ctime_ns)
    if place.name != _key(path) or time.time_ns() - changed < SETTLED:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write(place, found)
    except OSError as error:  # a cache that is shared for reading alone
        warnings.warn(
            f"prompt cache: '{place.parent}' cannot be written ({error.strerror}), so the next "
            f"start hashes '{path.name}' again",
            stacklevel=2,
        )
