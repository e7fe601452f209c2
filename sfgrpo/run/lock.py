"""A folder is one process's at a time.

The process holds a lock on a file in it: a POSIX record lock, which the system lets go when the
process ends, however it ends, which no forked child inherits, and which NFS carries to the other
machines (NFSv4 itself; NFSv3 by its lock service, and not where it is mounted with `nolock`). A
file system that knows no locks is said, and nothing keeps a second process out there. The file
holds who locked it, and stays. Only where nothing came to stand beside it, as when a run is refused
before it begins, is it removed again, with the folders that were made for it; whoever locked a file
that was removed meanwhile locks the one that has its name now.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

NAME = "run.lock"
"""The locked file in the folder of a run."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def take(path: Path, token: str, held: ExitStack, *, key: str) -> str | None:
    """Lock the file `path` until `held` closes, and leave the token there; returns what is in the
    way, told as `key`'s. This process must not open the file again: closing it lets go."""
    folder = path.parent
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(path.open("a+", encoding="utf-8"))
        other = _taken(file)
        while not other and not _stands(file, path):
            file.close()
            file = held.enter_context(path.open("a+", encoding="utf-8"))
            other = _taken(file)
        if other:
            return f"{key} '{folder}' is in use by {other}; stop it, or choose another"
        held.callback(_leave_nothing, path, made)
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "token": token}
        file.truncate(0)
        file.write(json.dumps(who) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        return f"{key} '{folder}' cannot be used: {error.strerror}"
    return None


def holder(path: Path) -> str | None:
    """Who has locked the file, if another process has. For a moment it is locked by this one."""
    try:
        file = path.open("r+", encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        return _taken(file)


def _stands(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _leave_nothing(path: Path, made: Sequence[Path]) -> None:
    """Remove the file, while it is locked, and the folders made for it if there is nothing else."""
    with suppress(OSError):  # others may write to these folders, too
        if [there.name for there in path.parent.iterdir()] == [path.name]:
            path.unlink()
            for folder in made:
                folder.rmdir()


def _taken(file: IO[str]) -> str | None:
    """Lock the file; returns who has it if another process does."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            who = parse(file.read())
            told = "process {process} on {host}, since {since}"
            return told.format_map(who) if who else "another process"
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"'{file.name}' cannot be locked ({error.strerror}): nothing keeps a second run out of "
            "this folder",
            stacklevel=2,
        )
    return None


def parse(text: str) -> dict[str, Any]:
    """What a lock file says; nothing if its holder has not written it yet."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    whole = isinstance(found, dict) and {"process", "host", "since", "token"} <= found.keys()
    return found if whole else {}
