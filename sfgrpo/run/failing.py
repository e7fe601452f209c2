"""Rewards that fail: what the ranks do about it, all of them the same and at the same point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from sfgrpo import engine
from sfgrpo.config import Recipe
from sfgrpo.guard import NonFinite
from sfgrpo.rewards import Calls, Failure, Mixture, RewardError
from sfgrpo.run.peers import Agreed


@runtime_checkable
class Asking(Protocol):
    """A reward that asks a server, and again where it must."""

    @property
    def retried(self) -> int:
        """Requests made again so far."""
        ...


class RewardFailed(RewardError, Agreed):
    """A reward failed in all attempts, and the run is to stop; raised on every rank."""


def calls(recipe: Recipe, end: Callable[[str], object]) -> Calls:
    """How a run of the recipe calls its rewards; `end` is told of a call that does not return."""
    return Calls(
        retries=recipe.reward_retries, policy=recipe.on_reward_failure,
        timeout=recipe.reward_timeout, end=end,
    )  # fmt: skip


def settle(reward: Mixture, policy: str) -> list[Failure]:
    """What failed on any rank since the last time (a collective); rank 0 warns of it.

    Raises:
        RewardFailed: something did, and the policy is "stop".
    """
    mine, reward.calls.failures = reward.calls.failures, []
    found = [failure for rank in engine.exchange(mine) for failure in rank]
    if found and policy == "stop":
        raise RewardFailed(found[0].message)
    if engine.rank() == 0:
        for text, message in {failure.text: failure.message for failure in found}.items():
            warnings.warn(f"goes on without prompt {text!r}: {message}", stacklevel=2)
    return found


def served(reward: Mixture) -> dict[str, str]:
    """What is served where rewards ask servers that tell it, by the name in the recipe."""
    asking = {name: getattr(one, "served", None) for name, one in reward.rewards.items()}
    return {name: what for name, what in asking.items() if isinstance(what, str)}


@contextmanager
def blamed(failures: Sequence[Failure]) -> Iterator[None]:
    """RewardFailed for NonFinite within the context, if rewards that failed are the reason."""
    try:
        yield
    except NonFinite as error:
        if not failures:
            raise
        raise RewardFailed(f"{error}: {failures[0].message}") from error


def retried(reward: Mixture) -> dict[str, int]:
    """`reward_retries`: calls and requests made again since the last time, on all ranks (a
    collective); nothing if no reward is ever asked again."""
    asking = [one.retried for one in reward.rewards.values() if isinstance(one, Asking)]
    if not asking and not reward.calls.retries:
        return {}
    total = reward.calls.retried + sum(asking)
    since, reward.calls.reported = total - reward.calls.reported, total
    return {"reward_retries": sum(engine.exchange(since))}
