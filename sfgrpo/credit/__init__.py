"""Rewards of a trajectory's clean estimates -> one advantage per step.

    gain_k = r_{k+1} - r_k      the improvement of the clean estimate that step k brought,

normalised over the prompt's group (`stepwise`), against the final reward's advantage on every step
(`uniform`). Gains telescope: they sum to r_T - r_0.

Shapes: P prompts, N trajectories per group, T steps; states are indexed 0 (x_T, pure noise)
to T (the final image). A rule is one function

    rewards [P, N, T + 1], trainable [T], options -> advantages [P, N, T]

To add one, write a module of this package that calls it `advantages`, or a file of your own, which
a recipe names "module:function". `options` are the recipe's section `credit`; what the function
takes beside them are options of its own (`credit.options`). A rule that reads the final reward
alone is decorated with `@rule(estimates=False)`, and no clean estimate is computed.

Of several rewards, a mixture (`sfgrpo.credit.mixtures`) says how they become one advantage. One
that scores final images alone has the same gain in each step, or block of steps: its final score,
divided by their number, so that its gains sum to it as any reward's do.

Only states that a gain needs are estimated and scored (`scored_states`): those at the start of a
step with noise, or of a block of `stride` such steps, and the final image. Every other state has
the reward of the next one that is scored, which the ODE leads it to, so that noise-free steps have
gain 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from sfgrpo.credit.components import Rewards
from sfgrpo.names import MIXTURE, RULE, Kind, blaming_own

if TYPE_CHECKING:  # a recipe names rules without PyTorch
    from torch import Tensor

    from sfgrpo.config import Credit

RuleFunction = Callable[..., "Tensor"]
"""`(rewards [P, N, T + 1], trainable [T], options, **options of its own) -> [P, N, T]`."""
MixtureFunction = Callable[..., "Tensor"]
"""`(rewards, trainable [T], options, **options of its own) -> [P, N, T]`, `rewards` a `Rewards`."""
F = TypeVar("F", bound=RuleFunction)


class CreditError(ValueError):
    """A rule or mixture of the user's own failed, or returned what is no advantages."""


@dataclass(frozen=True)
class Rule:
    """A credit rule and what it needs."""

    function: RuleFunction
    estimates: bool
    """Whether it reads the rewards of intermediate states."""
    raw: RuleFunction
    """What it normalises, of the same arguments and shape; the rule itself, if it does not say."""


def rule(
    name: str | None = None, *, estimates: bool = True, raw: RuleFunction | None = None
) -> Callable[[F], F]:
    """Say what a rule needs and, with `name`, let that mean it in this process.

    Args:
        raw: gives what the rule normalises, for mixtures that do so in their own way.
    """

    def register(function: F) -> F:
        function.estimates = estimates  # pyright: ignore[reportFunctionMemberAccess]
        function.raw = raw  # pyright: ignore[reportFunctionMemberAccess]
        if name is not None:
            RULE.register(name, function)
        return function

    return register


def get(options: Credit) -> Rule:
    """The rule that a recipe's section `credit` names, with its own options.

    Raises:
        ValueError: unknown rule or option (with the nearest name), or one that is missing.
    """
    function = RULE.bind(options.rule, options.options)
    raw = getattr(function, "raw", None) or function
    return Rule(function, getattr(function, "estimates", True), raw)


def mixture(options: Credit) -> MixtureFunction:
    """The mixture that a recipe's section `credit` names, with its own options.

    Raises:
        ValueError: unknown mixture or option (with the nearest name), or one that is missing.
    """
    return MIXTURE.bind(options.mixture, options.mixture_options)


def gains(rewards_PNS: Tensor) -> Tensor:
    """`[..., T + 1]` rewards of all states -> `[..., T]` gains of all steps."""
    return rewards_PNS.diff(dim=-1)


def statistics_mask(trainable_T: Tensor, options: Credit) -> Tensor | None:
    """bool `[T]`: the steps that enter mean and std; None for all."""
    return trainable_T if options.statistics == "trainable" else None


def block_states(trainable_T: Tensor, options: Credit) -> tuple[Tensor, Tensor]:
    """The scored states between which each step's gain is taken, int64 `[T]` each.

    Blocks are `options.stride` neighbours of the steps that enter the statistics; a step outside of
    all blocks, before the first, has the state after it at both ends.

    Args:
        trainable_T: bool `[T]`, the steps with noise.
    """
    import torch

    steps, device = len(trainable_T), trainable_T.device
    counted_T = statistics_mask(trainable_T, options)
    counted = torch.arange(steps, device=device) if counted_T is None else counted_T.nonzero()[:, 0]
    starts = counted[:: options.stride] if get(options).estimates else counted[:0]
    scored = torch.cat([starts, starts.new_tensor([steps])])
    step = torch.arange(steps, device=device)
    end = torch.searchsorted(scored, step, right=True)
    return scored[(end - 1).clamp_min(0)], scored[end]


def scored_states(trainable_T: Tensor, options: Credit, *, final_only: bool = False) -> Tensor:
    """int64 `[T + 1]`: which state's reward each state has, as far as the rule's gains need; itself
    if it is scored, else the next one that is. The final image's is its own.

    Args:
        trainable_T: bool `[T]`, the steps with noise.
        final_only: every reward sees final images alone.

    Raises:
        ValueError: as `get`.
    """
    start_T, end_T = block_states(trainable_T, options)
    if final_only:
        return end_T.new_full((len(end_T) + 1,), len(end_T))
    return start_T.new_tensor([int(start_T[0]), *end_T.tolist()])


def placed(scores_PNK: Tensor, where_S: Tensor) -> Tensor:
    """`[P, N, T + 1]`: the scores of the K scored states at their places, 0 elsewhere.

    Args:
        where_S: int64 `[T + 1]` of `scored_states`; indexing the result with it gives every state
            the score of the next one that has its own.
    """
    known = scores_PNK.new_zeros(*scores_PNK.shape[:2], len(where_S))
    return known.index_copy(2, where_S.unique(), scores_PNK)


def filled(known: Rewards, where_S: Tensor, trainable_T: Tensor, options: Credit) -> Rewards:
    """The rewards of all states, from those at the places where they were scored.

    Of a reward that saw final images alone, those that grow evenly from block to block.

    Args:
        known: of `placed`.
        where_S: int64 `[T + 1]` of `scored_states`.
    """
    _, begun_S = scored_states(trainable_T, options).unique(return_inverse=True)
    blocks = int(begun_S[-1])  # none if the rule reads the final reward alone

    def of(name: str, scores: Tensor) -> Tensor:
        if name not in known.final_only:
            return scores[..., where_S]
        grown_S = begun_S.to(scores.dtype) / blocks if blocks else begun_S.to(scores.dtype) + 1
        return scores[..., -1:] * grown_S

    return replace(known, scores={name: of(name, s) for name, s in known.scores.items()})


def advantages(
    rewards: Rewards | Tensor, trainable_T: Tensor, options: Credit | None = None
) -> Tensor:
    """Advantages of every step.

    Args:
        rewards: the reward of each state's clean estimate, the final image last; of a state that
            was not scored, that of the next one that was (`filled`). A single reward may be its
            tensor `[P, N, T + 1]`.
        trainable_T: bool `[T]`, False on noise-free steps: their advantage is 0.
        options: which rule and mixture, and how gains become advantages; default
            `sfgrpo.config.Credit()`.

    Returns:
        `[P, N, T]` float32.

    Raises:
        ValueError: as `get` and `mixture`.
        CreditError: the rule or the mixture failed, or returned another shape.
    """
    if options is None:
        from sfgrpo.config import Credit

        options = Credit()
    given = rewards if isinstance(rewards, Rewards) else Rewards.one(rewards)
    expected = (*given.total.shape[:2], len(trainable_T))
    function = mixture(options)
    with _told(MIXTURE, options.mixture):
        found = function(given, trainable_T, options)
    return _checked(MIXTURE, options.mixture, found, expected) * trainable_T


def by_rule(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """What the rule makes of one reward, `[P, N, T]`; mixtures are made of it.

    Raises:
        ValueError: as `get`.
        CreditError: the rule failed, or returned another shape.
    """
    function, expected = get(options).function, (*rewards_PNS.shape[:2], len(trainable_T))
    with _told(RULE, options.rule):
        found = function(rewards_PNS, trainable_T, options)
    return _checked(RULE, options.rule, found, expected)


def _told(kind: Kind, name: str) -> AbstractContextManager[None]:
    """What a function of the user's own raises, in one line with its place."""
    return blaming_own(name, CreditError, f"{kind.what} '{name}' failed")


def _checked(kind: Kind, name: str, found: object, expected: tuple[int, ...]) -> Tensor:
    """`found`, which must be advantages of the shape `expected`."""
    from torch import Tensor

    got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or tuple(found.shape) != expected:
        raise CreditError(f"{kind.what} '{name}' returned {got}, expected {expected}")
    return found
