"""Asked to stop (SIGTERM, Ctrl-C): the run saves at the next safe point and ends.

Safe points lie between the phases of an iteration. An iteration that has not changed the weights
yet is dropped: continued, it is repeated bit for bit.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from sfgrpo import engine


class Interrupted(Exception):
    """The run was asked to stop; `status` is the exit status by the shells' convention."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Signals:
    """Within the context SIGTERM and SIGINT ask the run to stop; a second one ends it at once."""

    HANDLED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._former = {number: signal.signal(number, self._receive) for number in self.HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def check(self) -> None:
        """A safe point; every rank must come here, so that all stop at the same one.

        Raises:
            Interrupted: some rank received a signal.
        """
        if number := engine.largest(self.received):
            raise Interrupted(number)
