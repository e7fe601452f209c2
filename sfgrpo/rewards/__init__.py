"""Rewards by name, and their weighted sum."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfgrpo.names import unknown_name
from sfgrpo.rewards.base import Metadata, Reward

__all__ = ["Metadata", "Mixture", "Reward", "available", "build", "load"]


def available() -> list[str]:
    """Names of the rewards in this package, one per module."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def build(name: str, **options: Any) -> Reward:
    """The reward `name`: a module of this package, or "package.module:function" of one's own.

    The function is called with `options` and returns a `Reward`. ValueError for an unknown name.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)(**options)
    if name not in available():
        raise ValueError(unknown_name("reward", name, available()))
    return importlib.import_module(f"{__name__}.{name}").build(**options)


class Mixture:
    """Weighted sum of rewards; the weights are used as given, not normalised."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError("a mixture needs at least one reward")
        if set(rewards) != set(weights):
            raise ValueError(f"rewards {sorted(rewards)} but weights for {sorted(weights)}")
        self.rewards = dict(rewards)
        self.weights = dict(weights)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        finite: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total [B] float32 and every reward's own scores [B] float32, on the CPU.

        ValueError if the lengths differ, or a reward returns another shape or a value that is not
        finite (the message names the reward; `finite=False` passes such values on).
        """
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        scores: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            score = reward(images, prompts, metadata).float().cpu()
            if score.shape != (len(images),):
                raise ValueError(
                    f"reward {name!r} returned shape {tuple(score.shape)} for {len(images)} images"
                )
            if finite and not torch.isfinite(score).all():
                bad = int((~torch.isfinite(score)).nonzero()[0])
                raise ValueError(f"reward {name!r} is {score[bad]} for prompt {prompts[bad]!r}")
            scores[name] = score
        total = torch.zeros(len(images))
        for name, score in scores.items():
            total += self.weights[name] * score
        return total, scores


def load(
    weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None
) -> Mixture:
    """The mixture of the named rewards, e.g. `load({"ocr": 0.8, "colour": 0.2})`.

    `options` maps a reward's name to the arguments of its `build`. ValueError for options of a
    reward that has no weight.
    """
    given = dict(options or {})
    for name in given:
        if name not in weights:
            raise ValueError(unknown_name("reward in options", name, weights))
    return Mixture({name: build(name, **given.get(name, {})) for name in weights}, weights)
