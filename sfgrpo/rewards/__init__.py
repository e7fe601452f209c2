"""Rewards by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfgrpo.names import REWARD, unknown_name
from sfgrpo.rewards.base import Metadata, Reward

__all__ = ["Metadata", "Mixture", "Reward", "available", "build", "evenly", "load"]

CHUNK = 64
"""At most so many frames of videos go into a reward of images at once."""


def available() -> list[str]:
    """Names of the rewards in this package, one per module."""
    return REWARD.names()


def build(name: str, **options: Any) -> Reward:
    """The reward `name`: a module of this package, or "package.module:function" of one's own.

    The function is called with `options` and returns a `Reward`.

    Raises:
        ValueError: no reward of this name; an option that it does not have, or lacks one it needs.
    """
    return REWARD.bind(name, options)()


def evenly(count: int, available: int) -> list[int]:
    """`count` of `available` frames, evenly spread, the first and the last among them.

    All of them if there are no more; of a single one, the one in the middle.
    """
    if count >= available:
        return list(range(available))
    if count == 1:
        return [available // 2]
    gaps = count - 1
    return [(2 * i * (available - 1) + gaps) // (2 * gaps) for i in range(count)]


class Mixture:
    """Weighted sum of rewards; the weights are used as given, not normalised.

    Of a video, a reward with the attribute `takes_video = True` sees all; any other sees `frames`
    images of it, evenly spread, and its score of the video is the mean of theirs.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], *, frames: int = 8
    ) -> None:
        if not weights:
            raise ValueError("a mixture needs at least one reward")
        if set(rewards) != set(weights):
            raise ValueError(f"rewards {sorted(rewards)} but weights for {sorted(weights)}")
        if frames < 1:
            raise ValueError(f"reward_frames: needs at least 1 frame of a video, got {frames}")
        self.rewards = dict(rewards)
        self.weights = dict(weights)
        self.frames = frames

    def __call__(
        self,
        samples: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        finite: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total [B] float32 and every reward's own scores [B] float32, on the CPU.

        `samples` are images [B, 3, H, W], videos [B, F, 3, H, W], or what else a generator makes
        ([B, T, D] of robot actions), which rewards get as it is.

        ValueError if the lengths differ, or a reward returns another shape or a value that is not
        finite (the message names the reward; `finite=False` passes such values on).
        """
        if not len(samples) == len(prompts) == len(metadata):
            raise ValueError(
                f"{_count(samples)}, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        scores: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            if samples.ndim == 5 and not getattr(reward, "takes_video", False):
                score = self._of_frames(name, samples, prompts, metadata)
            else:
                score = self._of(name, samples, prompts, metadata)
            if finite and not torch.isfinite(score).all():
                bad = int((~torch.isfinite(score)).nonzero()[0])
                raise ValueError(f"reward {name!r} is {score[bad]} for prompt {prompts[bad]!r}")
            scores[name] = score
        total = torch.zeros(len(samples))
        for name, score in scores.items():
            total += self.weights[name] * score
        return total, scores

    def _of(
        self, name: str, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """One reward's scores [B] float32 on the CPU."""
        score = self.rewards[name](samples, prompts, metadata).float().cpu()
        if score.shape != (len(samples),):
            raise ValueError(
                f"reward {name!r} returned shape {tuple(score.shape)} for {_count(samples)}"
            )
        return score

    def _of_frames(
        self, name: str, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """The mean of one reward over the frames of each video, [B]."""
        if not videos.shape[1]:
            raise ValueError(f"videos without frames: {tuple(videos.shape)}")
        shown = evenly(self.frames, videos.shape[1])
        where = [(row, frame) for row in range(len(videos)) for frame in shown]
        found = [torch.empty(0)]
        for start in range(0, len(where), CHUNK):
            part = where[start : start + CHUNK]
            rows, frames = [row for row, _ in part], [frame for _, frame in part]
            images = videos[rows, frames]
            texts, entries = [prompts[row] for row in rows], [metadata[row] for row in rows]
            found.append(self._of(name, images, texts, entries))
        return torch.cat(found).unflatten(0, (len(videos), len(shown))).mean(1)


def _count(samples: Tensor) -> str:
    return f"{len(samples)} {({4: 'images', 5: 'videos'}).get(samples.ndim, 'samples')}"


def load(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    frames: int = 8,
) -> Mixture:
    """The mixture of the named rewards, e.g. `load({"ocr": 0.8, "colour": 0.2})`.

    `options` maps a reward's name to the arguments of its `build`, `frames` is how many frames of a
    video a reward of images sees. ValueError for options of a reward that has no weight, or that it
    does not have.
    """
    given = dict(options or {})
    for name in given:
        if name not in weights:
            raise ValueError(unknown_name("reward in options", name, weights))
    built = {name: build(name, **given.get(name, {})) for name in weights}
    return Mixture(built, weights, frames=frames)
