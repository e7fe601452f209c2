"""Rewards of a trajectory's clean estimates -> one advantage per step.

    gain_k = r_{k+1} - r_k      the improvement of the clean estimate that step k brought,

normalised over the prompt's group (Stepwise-Flow-GRPO, Savani et al. 2026, arXiv 2603.28718,
sec. 4), against `uniform`, which gives every step the final reward's advantage (Flow-GRPO,
arXiv 2505.05470). Gains telescope: they sum to r_T - r_0.

Shapes: P prompts, N trajectories per group, T steps; states are indexed 0 (x_T, pure noise)
to T (the final image). To add a rule, write one function and decorate it with `@rule("name")`;
a rule that reads the final reward alone says `estimates=False`, and no clean estimate is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.names import unknown_name


@dataclass(frozen=True, kw_only=True)
class CreditOptions:
    """How gains become advantages. Every rule reads the options that concern it."""

    normalize: ops.Normalization = "joint"
    """"joint", "per_step" or "centered": see `sfgrpo.ops.gain_advantages`."""
    stride: int = 1
    """Gains over blocks of this many steps, credited to each step of the block."""
    statistics: str = "trainable"
    """Whether noise-free steps, which have no gradient, enter mean and std: "trainable" or "all".
    "trainable" is the default: their gains are the same for the whole group, so they would
    shift the joint mean by a constant that says nothing about the steps that can learn."""
    clamp: float | None = 5.0
    """Advantages are limited to [-clamp, clamp]; None leaves them alone."""


RuleFunction = Callable[[Tensor, Tensor, CreditOptions], Tensor]


@dataclass(frozen=True)
class Rule:
    """A credit rule and what it needs."""

    function: RuleFunction
    """`(rewards [P, N, T + 1], trainable [T], options) -> advantages [P, N, T]`."""
    estimates: bool
    """Whether it reads the rewards of intermediate states."""


RULES: dict[str, Rule] = {}


def rule(name: str, *, estimates: bool = True) -> Callable[[RuleFunction], RuleFunction]:
    """Register a credit rule under `name`."""

    def register(function: RuleFunction) -> RuleFunction:
        RULES[name] = Rule(function, estimates)
        return function

    return register


def gains(rewards_PNS: Tensor) -> Tensor:
    """`[..., T + 1]` rewards of all states -> `[..., T]` gains of all steps."""
    return rewards_PNS.diff(dim=-1)


def _blocks(rewards_PNS: Tensor, stride: int) -> Tensor:
    """Rewards whose per-step gains are the block gains of the given ones."""
    steps = rewards_PNS.shape[-1] - 1
    step = torch.arange(steps, device=rewards_PNS.device)
    start = step // stride * stride
    end = (start + stride).clamp_max(steps)
    block_gains = rewards_PNS[..., end] - rewards_PNS[..., start]
    first = rewards_PNS[..., :1]
    return torch.cat([first, first + block_gains.cumsum(-1)], dim=-1)


def _mask(trainable_T: Tensor, options: CreditOptions) -> Tensor | None:
    return trainable_T if options.statistics == "trainable" else None


@rule("uniform", estimates=False)
def uniform(rewards_PNS: Tensor, trainable_T: Tensor, options: CreditOptions) -> Tensor:
    """Flow-GRPO: the group-normalised final reward on every step."""
    return ops.gain_advantages(
        rewards_PNS, normalize="uniform", mask=_mask(trainable_T, options), clamp=options.clamp
    )


@rule("stepwise")
def stepwise(rewards_PNS: Tensor, trainable_T: Tensor, options: CreditOptions) -> Tensor:
    """Stepwise-Flow-GRPO: each step's own gain, normalised over the group."""
    if options.stride > 1:
        rewards_PNS = _blocks(rewards_PNS, options.stride)
    return ops.gain_advantages(
        rewards_PNS,
        normalize=options.normalize,
        mask=_mask(trainable_T, options),
        clamp=options.clamp,
    )


def get(name: str) -> Rule:
    """The rule called `name`; an unknown name is an error that says the nearest."""
    if name not in RULES:
        raise ValueError(unknown_name("credit rule", name, RULES))
    return RULES[name]


def advantages(
    rewards_PNS: Tensor,
    trainable_T: Tensor,
    *,
    name: str = "stepwise",
    options: CreditOptions | None = None,
) -> Tensor:
    """Advantages of every step.

    Args:
        rewards_PNS: `[P, N, T + 1]`, the reward of each state's clean estimate, the final image
            last; rules without estimates read the last entry only.
        trainable_T: bool `[T]`, False on noise-free steps: their advantage is 0.
        name: a rule in `RULES`.

    Returns:
        `[P, N, T]` float32.
    """
    return get(name).function(rewards_PNS, trainable_T, options or CreditOptions()) * trainable_T
