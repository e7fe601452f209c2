"""What a reward is, and the weighted mixture of several.

A reward is one module of this package with a function `build(**options) -> Reward`; the module's
name is the name in the configuration, so a reward is added by adding a file. A reward of the
user's own is named "package.module:function".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

Metadata = Mapping[str, Any]
SOUND = "sound"
"""The key of metadata under which a reward that takes sound finds a `Sound`."""
B = TypeVar("B", bound=Callable[..., Any])


def final_only(build: B) -> B:
    """Say of a reward, by the function or class that a recipe names, that it scores final images
    alone: one that is slow, or means nothing for the clean estimates of noisy states. Its share is
    credited to all noisy steps alike."""
    build.final_only = True  # pyright: ignore[reportFunctionMemberAccess]
    return build


@dataclass(frozen=True, eq=False)
class Sound:
    """What is heard with a video."""

    waveform: Tensor
    """float32 [channels, samples] in [-1, 1]."""
    rate: int
    """Samples a second."""


class RewardError(ValueError):
    """A reward or a judge did what it may not: the message names it and what it returned."""


class Unscored(RewardError):
    """Some samples of a call have no score although the reward asked for them again itself:
    `scores` [B] holds nan there, and what was found out of the others."""

    def __init__(self, message: str, scores: Tensor) -> None:
        super().__init__(message)
        self.scores = scores


def expect_images(samples: Tensor) -> None:
    """ValueError for samples of a generator that makes no images, such as sound or actions."""
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(
            f"it scores images [B, 3, H, W], got samples {list(samples.shape)}: this reward is not "
            "for what the generator makes"
        )


@contextlib.contextmanager
def staying(who: str) -> Iterator[None]:
    """RewardError, naming `who`, for sys.exit within the context: it would end the run as if it
    were done."""
    try:
        yield
    except SystemExit as error:
        raise RewardError(f"{who} called sys.exit({error.code!r})") from error


class Reward(Protocol):
    """Scores images; higher is better.

    A reward of videos has the attribute `takes_video = True`, and gets them whole, as
    [B, F, 3, H, W]. Any other gets frames of them as images, each with its video's prompt. A reward
    for a generator of other samples gets what that one decodes, [B, ...]. One of final images alone
    is decorated with `@final_only`.

    One that hears the sound of a generator that makes some with its videos has the attribute
    `takes_sound = True`: each entry of its metadata has the sample's `Sound` under "sound".

    Images, prompts and metadata are the reward's own copies, which it may overwrite. It runs
    without gradients; one that needs some turns them on (`torch.enable_grad`).

    One that asks a server has the name of what is served there as attribute `served`: a run goes on
    with the same only.

    The attribute `bounds_time = True` says that every call ends by itself, as of a reward that asks
    a server; `reward_timeout` leaves it alone.

    A reward may have a method `check(prompts, metadata) -> None`, which is called once with all
    prompts of a run, before the network is loaded. It raises for a prompt that could not be scored
    (metadata that lack a key, a character that cannot be read), so that a run does not end when the
    prompt is drawn, hours later; the run says in which file and line the prompt stands.
    """

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """Scores [B], all finite: a tensor, a NumPy array or a list of numbers.

        `images` is [B, 3, H, W] float in [0, 1]; `prompts` and `metadata` have one entry per
        image. KeyError if a prompt's metadata lacks what the reward needs.
        """
        ...
