"""Asked to stop (SIGTERM, Ctrl-C, SIGHUP, a launcher that is gone): the run saves and ends.

It does so at the next safe point. Safe points lie between the phases of an iteration, and between
the steps of sampling, estimates and evaluation, which take minutes. An iteration that has not
changed the weights yet is dropped, as is an evaluation: continued, it is repeated bit for bit.

What launchers do (DeepSpeed 0.19.8, torchrun of PyTorch 2.10), so that one wish arrives as many:
- Ctrl-C goes from the terminal to every process, and from a launcher once more to its ranks:
  `deepspeed` sends SIGTERM to one rank after the other, torchrun sends the SIGINT again.
- The command `deepspeed` waits for a process of its own, `deepspeed.launcher.launch`, which starts
  the ranks. SIGTERM to the command ends it alone: nobody tells the launcher or the ranks.
- Both launchers kill what has not ended 30 seconds after their signal.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import PurePath
from types import FrameType

import psutil

from sfgrpo import engine

REPEAT = 2.0
"""Seconds in which the same signal once more is the same wish, passed on by a launcher."""
ORPHANED = signal.NSIG
"""Stands for a signal where the launcher is gone; above all signals."""
LAUNCHERS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.")


class Interrupted(Exception):
    """The run was asked to stop; `status` is the exit status by the shells' convention."""

    def __init__(self, number: int) -> None:
        gone = number == ORPHANED
        super().__init__("its launcher is gone" if gone else signal.Signals(number).name)
        self.status = 128 + (signal.SIGHUP if gone else number)


class Signals:
    """Within the context SIGTERM, SIGINT and SIGHUP ask the run to stop.

    The same signal again after `REPEAT` seconds ends it at once. SIGHUP stays ignored where
    `nohup` had it ignored.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._since: dict[int, float] = {}
        self._former: dict[int, object] = {}
        self._launchers: list[psutil.Process] = []

    def __enter__(self) -> Signals:
        self._launchers = launchers()
        for number in self.HANDLED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._since.setdefault(number, now) >= REPEAT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or number

    def check(self) -> None:
        """A safe point; every rank must come here, so that all stop at the same one.

        Raises:
            Interrupted: some rank received a signal, or lost its launcher.
        """
        if not (self.received or all(map(alive, self._launchers))):
            self.received = ORPHANED
        if number := engine.largest(self.received):
            raise Interrupted(number)


def launchers() -> list[psutil.Process]:
    """The launcher that started this process, and the command that started the launcher.

    None of them is a shell or a daemon: a run that was started by those and left behind goes on.
    """
    found = []
    for ancestor in psutil.Process().parents():
        if not _launches(ancestor):
            break
        found.append(ancestor)
    return found


def _launches(process: psutil.Process) -> bool:
    try:
        interpreter, *words = process.cmdline() or [""]
    except psutil.Error:  # another user's, or gone
        return False
    if not PurePath(interpreter).name.startswith("python"):
        return False
    # python /usr/bin/deepspeed, or python -u -m deepspeed.launcher.launch
    program = next((word for word in words if not word.startswith("-")), "")
    return PurePath(program).name in LAUNCHERS or program.startswith(LAUNCHER_MODULES)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs: it and no other of its number, nor its body."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
