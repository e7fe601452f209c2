"""Calls that run one after the other in a thread of their own while the main thread goes on.

Made for rewards: a reward on the CPU or behind a network, and a generator on a GPU, have no reason
to wait for each other. One thread, so that a reward needs no lock and sees its calls in an order
that depends on nothing but the recipe.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


class InOrder(Generic[Result]):
    """A context in which calls are made in their order, `ahead` of them at most not yet answered.

    An exception of a call is raised in the main thread, with its own traceback, by the next `ask`
    or by `answers`; calls that have not begun by then are not made. Gradients are not recorded, and
    CUDA work is queued on the stream that the main thread had when it asked: what it had queued is
    done by then.
    """

    def __init__(self, ahead: int) -> None:
        """`ahead`: 0 makes each call at once, in the main thread."""
        self.ahead = ahead
        self.computed = 0.0
        """Seconds that the thread has computed; 0 where there is none."""
        self._asked: list[Future[Result]] = []
        self._answered: list[Result] = []
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> InOrder[Result]:
        if self.ahead:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def ask(self, call: Callable[[], Result]) -> None:
        """Have `call` made; waits until no more than `ahead` calls, this one among them, are not
        answered."""
        if self._thread is None:
            with torch.no_grad():
                self._answered.append(call())
            return
        while len(self._asked) >= self.ahead:
            self._answered.append(self._asked.pop(0).result())
        self._asked.append(self._thread.submit(self._timed, call, _stream()))

    def answers(self) -> list[Result]:
        """What all the calls returned, in the order of `ask`; waits for them."""
        while self._asked:
            self._answered.append(self._asked.pop(0).result())
        return self._answered

    def _timed(self, call: Callable[[], Result], stream: Any) -> Result:
        start = time.perf_counter()
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                return call()
        finally:
            self.computed += time.perf_counter() - start


def _stream() -> Any:
    """This thread's CUDA stream, which knows its device; None where CUDA is not in use."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None
