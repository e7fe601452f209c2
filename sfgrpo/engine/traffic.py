"""How long this process waited for other ranks and talked to them.

A collective begins when the slowest rank comes to it. So there is a barrier before each of ours,
and before the gradients of an optimiser step are reduced: the time in it is waiting, what follows
is communication.

DeepSpeed's collectives are timed on CPUs, where they block. On GPUs they overlap with computing and
only a synchronisation after each could time them: there they count with the phase they serve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from deepspeed.comm import comm
from deepspeed.utils.comms_logging import CommsLogger

Kind = Literal["waiting", "communication"]

_seconds: dict[Kind, float] = {"waiting": 0.0, "communication": 0.0}


def spent() -> dict[Kind, float]:
    """Seconds since the process started."""
    return dict(_seconds)


def synchronize() -> None:
    """Wait until the device has done what it was given, so that a clock can tell."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def timed(kind: Kind) -> Iterator[None]:
    """Count the time within."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    _seconds[kind] += time.perf_counter() - start


class _Listener(CommsLogger):
    """What DeepSpeed reports each of its collectives to."""

    def configure(self, comms_config: object) -> None:
        """A recipe does not set this."""

    def append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        """`latency` is in milliseconds, of all calls since the timer was reset."""
        _seconds["communication"] += latency / 1000
        comm.timers(record_name).reset()


def listen() -> None:
    """Time DeepSpeed's collectives, where that costs nothing."""
    if not torch.cuda.is_available():
        listener = _Listener()
        listener.enabled = listener.prof_all = True
        comm.comms_logger = listener
