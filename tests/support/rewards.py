"""Rewards for tests of the trainer: cheap, and able to fail on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sfgrpo.rewards import final_only


class Crash(BaseException):
    """Stands for the power cut, which nobody catches."""


class Redness:
    """How red an image is; raises `Crash` at the call numbered `crash_at`, and sends its own
    process a signal at the one numbered `signal_at`."""

    calls = 0
    crash_at: int | None = None
    signal_at: int | None = None
    signal = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        type(self).calls += 1
        if type(self).calls == type(self).crash_at:
            raise Crash
        if type(self).calls == type(self).signal_at:
            os.kill(os.getpid(), self.signal)
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class NotANumber:
    """A reward environment gone wrong."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        return torch.full((len(images),), float("nan"))


class Patchy:
    """Fails on one prompt."""

    spoilt: str | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        return torch.tensor([torch.inf if text == self.spoilt else 0.0 for text in prompts])


@final_only
class Blueness:
    """How blue an image is, a hundredfold; of final images alone. Keeps how many it was shown."""

    shown = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        type(self).shown += len(images)
        return 100 * images[:, 2].mean((1, 2))
