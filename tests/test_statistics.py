"""The numbers of an iteration: of several rewards, each has its own."""

from __future__ import annotations

import pytest
import torch

from sfgrpo.credit import Rewards
from sfgrpo.statistics import reward_statistics

FINAL = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
"""Of two groups of two: means 2 and 2, standard deviations 1 and 0."""


def states(final_PN: torch.Tensor) -> torch.Tensor:
    """From 0 over 1 to the final reward."""
    return torch.stack([torch.zeros(2, 2), torch.ones(2, 2), final_PN], -1)


def test_each_of_several_rewards_has_the_numbers_of_the_sum() -> None:
    both = Rewards(scores={"a": states(FINAL), "b": states(100 * FINAL)}, weights={"a": 1, "b": 2})
    found = reward_statistics(both)
    assert found["reward"] == 2 + 2 * 200
    assert (found["a"], found["b"]) == (2, 200)
    assert found["reward_std_in_group"] == pytest.approx(0.5 * 201)
    stds = [found[f"reward_std_in_group.{name}"] for name in "ab"]
    assert stds == pytest.approx([0.5, 50])
    assert found["reward_per_state.b"] == [0, 1, 200]
    assert found["gain_per_step.a"] == [1, 1]  # |gain| of 0, 2, 1, 1 behind the middle
    assert found["gain_per_step.b"] == [1, 199]
    assert found["gain_per_step"] == [3, 1 + 2 * 199]


def test_of_one_reward_nothing_is_told_twice() -> None:
    assert [name for name in reward_statistics(Rewards.one(states(FINAL))) if "." in name] == []


def test_a_dropped_group_is_in_no_number() -> None:
    spoilt = 100 * FINAL
    spoilt[1, 0] = torch.nan
    both = Rewards(scores={"a": states(FINAL), "b": states(spoilt)}, weights={"a": 1, "b": 2})
    found = reward_statistics(both)
    assert found["dropped_groups"] == 1
    assert found["reward_std_in_group.a"] == 1
    assert found["reward_per_state.b"] == [0, 1, 200]
