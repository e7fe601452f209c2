"""Rewards for tests of the trainer: cheap, and able to fail on demand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Crash(RuntimeError):
    """Stands for the power cut."""


class Redness:
    """How red an image is; raises `Crash` at the call numbered `crash_at`."""

    calls = 0
    crash_at: int | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        type(self).calls += 1
        if type(self).calls == type(self).crash_at:
            raise Crash
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class NotANumber:
    """A reward environment gone wrong."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        return torch.full((len(images),), float("nan"))
