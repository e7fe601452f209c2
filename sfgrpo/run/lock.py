"""A folder is one process's at a time.

The process holds a lock on a file in it: a POSIX record lock, which the system lets go when the
process ends, however it ends, which no forked child inherits, and which NFS carries to the other
machines (NFSv4 itself; NFSv3 by its lock service, and not where it is mounted with `nolock`). A
file system that knows no locks is said, and nothing keeps a second process out there. The file
stays: removing it would let two processes lock two files of one name. It holds who locked it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from contextlib import ExitStack
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
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(path.open("a+", encoding="utf-8"))
        if other := _taken(file):
            return f"{key} '{folder}' is in use by {other}; stop it, or choose another"
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
    if not path.exists():
        return None
    with path.open("a+", encoding="utf-8") as file:
        return _taken(file)


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
