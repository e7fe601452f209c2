"""A run folder is one run's at a time, and the same folder for all its ranks.

Rank 0 holds a lock on `run.lock` while it runs: a POSIX record lock, which the system lets go when
the process ends, however it ends, which no forked child inherits, and which NFS carries to the
other machines (NFSv4 itself; NFSv3 by its lock service, and not where it is mounted with `nolock`).
A file system that knows no locks is said, and nothing keeps a second run out there. The file stays:
removing it would let two runs lock two files of one name.

The file holds who locked it, and a token that every other rank must find there: ranks on several
machines that were given a relative path, or a disk of their own, find another or none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from sfgrpo import engine
from sfgrpo.run.agreement import Refused

NAME = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE = 5.0
"""Seconds in which a file that rank 0 wrote must be seen: network file systems may be late."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the context the folder is this run's; every rank must enter.

    Raises:
        Refused: another run has it, it cannot be written, or not every rank sees it (on every
            rank).
    """
    with ExitStack() as held:
        token, problem = secrets.token_hex(16), None
        if engine.rank() == 0:
            problem = _lock(folder, token, held)
        token, problem = engine.exchange((token, problem))[0]
        if problem:
            raise Refused(problem)
        if engine.world() > 1:
            _check_shared(folder, token)
        yield


def _lock(folder: Path, token: str, held: ExitStack) -> str | None:
    """Lock the folder and leave the token there; returns what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((folder / NAME).open("a+", encoding="utf-8"))
        if holder := _taken(file):
            return f"run.output_dir '{folder}' is in use by {holder}; stop it, or choose another"
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "token": token}
        file.truncate(0)
        file.write(json.dumps(who) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        return f"run.output_dir '{folder}' cannot be used: {error.strerror}"
    return None


def _taken(file: IO[str]) -> str | None:
    """Lock the file; returns who has it if another process does."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            who = _parse(file.read())
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


def _parse(text: str) -> dict[str, Any]:
    """What a lock file says; nothing if its holder has not written it yet."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    whole = isinstance(found, dict) and {"process", "host", "since", "token"} <= found.keys()
    return found if whole else {}


def _check_shared(folder: Path, token: str) -> None:
    """Refuse a folder that is not the same for all ranks."""
    # Rank 0 must not open the file again: closing it would give up the lock.
    sees = engine.rank() == 0 or _finds(folder / NAME, token)
    ranks = engine.exchange((sees, socket.gethostname(), str(folder.absolute())))
    for rank, (found, host, path) in enumerate(ranks):
        if not found:
            raise Refused(
                f"run.output_dir '{path}' of rank {rank} (on {host}) is not the folder "
                f"'{ranks[0][2]}' of rank 0 (on {ranks[0][1]}): give the absolute path of a folder "
                "on a disk that all ranks share"
            )


def _finds(file: Path, token: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if _parse(file.read_text(encoding="utf-8")).get("token") == token:
                return True
        except OSError:  # not there, or closed to this rank's user: not seen
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
