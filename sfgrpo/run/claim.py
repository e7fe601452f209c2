"""A run folder is one run's at a time, and the same folder for all its ranks.

Rank 0 holds the folder's lock (`sfgrpo.run.lock`) while it runs. The locked file holds a token that
every other rank must find there: ranks on several machines that were given a relative path, or a
disk of their own, find another or none.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sfgrpo import engine
from sfgrpo.run import lock
from sfgrpo.run.agreement import Refused

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
            problem = lock.take(folder / lock.NAME, token, held, key="run.output_dir")
        token, problem = engine.exchange((token, problem))[0]
        if problem:
            raise Refused(problem)
        if engine.world() > 1:
            _check_shared(folder, token)
        yield


def _check_shared(folder: Path, token: str) -> None:
    """Refuse a folder that is not the same for all ranks."""
    # Rank 0 must not open the file again: closing it would give up the lock.
    sees = engine.rank() == 0 or _finds(folder / lock.NAME, token)
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
            if lock.parse(file.read_text(encoding="utf-8")).get("token") == token:
                return True
        except OSError:  # not there, or closed to this rank's user: not seen
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
