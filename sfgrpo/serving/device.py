"""The reward of a server, one batch at a time, and the queue before it.

A request is admitted before its body is read, so that what waits is bounded in number and in bytes;
who is not admitted is told when to come back. Beside the batch that is scored one more is decoded
meanwhile, so that few decoded images are held however long the queue is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
from torch import Tensor

from sfgrpo.prompts import Prompt
from sfgrpo.remote.wire import Batch, Limits, Refused, decode
from sfgrpo.rewards import Calls, Reward, RewardError
from sfgrpo.rewards.base import staying
from sfgrpo.serving.counts import Counts

AHEAD = 2
"""Batches that are decoded at once: the one that is scored, and the next."""
HELD = 4
"""The queue holds as many bytes as so many requests of the largest size."""


class Gone(Exception):
    """The client has left: nobody waits for the scores."""


class Busy(Refused):
    """The queue is full; `after` are the seconds in which half of it should be done."""

    def __init__(self, after: int) -> None:
        super().__init__(503, f"the queue is full; come back in {after} s")
        self.after = after


class Device:
    """Scores batches with one reward."""

    def __init__(self, name: str, reward: Reward, *, limits: Limits, queue: int) -> None:
        """`queue`: requests that wait or are scored. ValueError for a reward that takes sound."""
        if getattr(reward, "takes_sound", False):
            raise ValueError(
                f"reward '{name}' takes sound, which is not sent to a server; name it in the recipe"
            )
        self.name, self.reward, self.limits, self.queue = name, reward, limits, queue
        self.takes_video: bool = getattr(reward, "takes_video", False)
        self.counts = Counts(name)
        self._calls = Calls()
        self._ahead = asyncio.Semaphore(AHEAD)
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")

    @asynccontextmanager
    async def admitted(self, size: int) -> AsyncIterator[None]:
        """Within the context a request of so many bytes has a place in the queue; Busy if there is
        none."""
        counts = self.counts
        full = counts.queued_bytes + size > HELD * self.limits.body
        if counts.queued >= self.queue or full:
            mean = counts.seconds / counts.batches if counts.batches else 1.0
            raise Busy(min(30, max(1, math.ceil(mean * counts.queued / 2))))
        counts.queued += 1
        counts.queued_bytes += size
        try:
            yield
        finally:
            counts.queued -= 1
            counts.queued_bytes -= size

    async def score(
        self, kind: str, body: bytes, left: Callable[[], Awaitable[bool]]
    ) -> list[float | None]:
        """Scores of a batch that was sent, None where one is not finite.

        Raises:
            Refused: it is no batch, or not for this reward.
            RewardError: the reward failed.
            Gone: `left` said so when its turn came.
        """
        loop = asyncio.get_running_loop()
        async with self._ahead:
            batch = await loop.run_in_executor(self._decoder, decode, kind, body, self.limits)
            if batch.samples.ndim == 5 and not self.takes_video:
                raise Refused(400, f"reward '{self.name}' scores images: send frames as images")
            async with self._turn:
                if await left():
                    raise Gone
                self.counts.began = time.monotonic()
                try:
                    scores = await loop.run_in_executor(self._worker, self._scored, batch)
                finally:
                    self.counts.seconds += time.monotonic() - self.counts.began
                    self.counts.began = None
        self.counts.batches += 1
        self.counts.samples += len(scores)
        return [score if math.isfinite(score) else None for score in scores.tolist()]

    def _scored(self, batch: Batch) -> Tensor:
        asked = [Prompt(t, m) for t, m in zip(batch.prompts, batch.metadata, strict=True)]
        with torch.no_grad():
            return self._calls.score(self.name, self.reward, batch.samples, asked)

    async def check(self, prompts: list[str], metadata: list[dict]) -> None:
        """Let the reward look at prompts, in its turn; RewardError if it cannot score them."""
        check = getattr(self.reward, "check", None)
        if check is None:
            return

        def checked() -> None:
            try:
                with staying("the reward"):
                    check(prompts, metadata)
            except Exception as error:  # a reward of one's own raises what it likes
                said = str(error.args[0]) if len(error.args) == 1 else str(error)
                named = said if " " in said else f"{type(error).__name__} {said}"
                raise RewardError(named) from error

        async with self._turn:
            await asyncio.get_running_loop().run_in_executor(self._worker, checked)
