"""Standard output and error that outlive whoever reads them.

A run's output often goes through a pipe (`| tee log`) or to a terminal. When the reader is gone a
write fails, and a progress bar or a print of a reward would end a run that nothing is wrong with.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO)
"""How a write fails if nobody reads the pipe any more, or the terminal was closed."""


class Lasting:
    """A text stream that writes to nowhere once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Send the file descriptor to nowhere, also for C++ and for what is still buffered."""
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def lasting() -> Iterator[None]:
    """Within the context it does not matter whether anybody reads what is printed."""
    former = sys.stdout, sys.stderr
    streams = [Lasting(stream) for stream in former]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:  # not by the interpreter, who exits with 120 if that fails
            stream.flush()
        sys.stdout, sys.stderr = former
