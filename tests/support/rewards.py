"""Rewards for tests of the trainer: cheap, and able to fail on demand."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfgrpo.rewards import Metadata, Sound, final_only


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


def failing(way: int, count: int) -> Any:
    """What a reward of `count` samples does that fails in one of four ways."""
    match way:
        case 0:
            raise OSError("connection reset")
        case 1:
            return torch.full((count,), torch.nan)
        case 2:
            return torch.zeros(count + 1)
        case _:
            return ["no number"] * count


class Flaky:
    """Redness of an environment of which a share of calls fails, each time in another way, by a
    generator of its own; of prompts with `spoilt` in them, every call."""

    share = 0.0
    spoilt: str | None = None
    random = random.Random(0)
    failed = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Any:
        kind = type(self)
        if kind.spoilt and any(kind.spoilt in prompt for prompt in prompts):
            raise OSError("the environment is gone")
        noise = torch.rand(len(images)) / 100  # from the run's own generator
        if kind.random.random() < kind.share:
            kind.failed += 1
            return failing(kind.random.randrange(4), len(images))
        return Redness()(images, prompts, metadata) + noise


class Hangs:
    """Does not return once an evaluation and an iteration of the small recipe are scored, which
    call it once and four times, and the evaluation after them."""

    calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        type(self).calls += 1
        while type(self).calls > 6:
            time.sleep(0.1)
        return torch.rand(len(images))


class Loudness:
    """How loud the sound is, of the videos' generators that make some; keeps what it heard."""

    takes_sound = True
    takes_video = True
    heard: ClassVar[list[Sound]] = []

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        sounds = [entry["sound"] for entry in metadata]
        type(self).heard += sounds
        return torch.stack([sound.waveform.square().mean() for sound in sounds])
