"""Rewards that hear what a generator makes beside its videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo.prompts import Prompt
from sfgrpo.remote.wire import Limits
from sfgrpo.rewards import Calls, Mixture, RewardError, Sound
from sfgrpo.serving.device import Device
from tests.support.rewards import Loudness

VIDEOS = torch.zeros(3, 2, 3, 4, 4)
TEXTS = ["a bell", "a bell", "rain"]


def sounds() -> list[Sound]:
    return [Sound(torch.full((2, 5), float(loud)), 16_000) for loud in (1, 2, 3)]


class Deaf:
    """Takes no sound; how many metadata it got."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return torch.tensor([float(len(entry)) for entry in metadata])


def test_a_reward_that_takes_sound_gets_each_samples_own() -> None:
    given = sounds()
    mixed = Mixture({"loud": Loudness(), "deaf": Deaf()}, {"loud": 1.0, "deaf": 1.0})
    _, scores = mixed(VIDEOS, TEXTS, [{"key": 1}] * 3, sounds=given)
    assert scores["loud"].tolist() == [1, 4, 9]
    assert scores["deaf"].tolist() == [1, 1, 1]
    final = torch.tensor([True, False, True])
    alone = Mixture({"loud": Loudness()}, {"loud": 1.0}, final_only={"loud"})
    total, _ = alone(VIDEOS, TEXTS, [{}] * 3, sounds=given, final=final)
    assert total.tolist() == [1, 0, 9]


def test_a_reward_may_overwrite_what_it_hears() -> None:
    class Ruins(Loudness):
        def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
            found = super().__call__(images, prompts, metadata)
            for entry in metadata:
                entry["sound"].waveform.zero_()
            return found

    given = sounds()
    mixed = Mixture({"a": Ruins(), "b": Loudness()}, {"a": 1.0, "b": 1.0})
    _, scores = mixed(VIDEOS, TEXTS, [{}] * 3, sounds=given)
    assert scores["b"].tolist() == [1, 4, 9]
    assert given[2].waveform.all()


def test_where_there_is_no_sound_a_reward_that_takes_it_is_refused() -> None:
    mixed = Mixture({"loud": Loudness()}, {"loud": 1.0})
    with pytest.raises(ValueError, match="'loud' takes sound, and this model"):
        mixed.check([Prompt("a bell", {})])
    mixed.check([Prompt("a bell", {})], heard=True)
    with pytest.raises(RewardError, match="'loud' takes sound, and the samples come without any"):
        mixed(VIDEOS, TEXTS, [{}] * 3)


def test_a_server_gets_no_sound_and_so_serves_no_reward_that_takes_it() -> None:
    with pytest.raises(ValueError, match="reward 'loud' takes sound, which is not sent"):
        Device("loud", Loudness(), limits=Limits(), queue=1)


def test_a_call_that_fails_is_divided_by_prompt_and_not_by_sound() -> None:
    class Picky(Loudness):
        def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
            if "a bell" in prompts:
                raise OSError("no bells")
            return super().__call__(images, prompts, metadata)

    mixed = Mixture({"it": Picky()}, {"it": 1.0}, calls=Calls(policy="drop_group"))
    total, _ = mixed(VIDEOS, TEXTS, [{}] * 3, sounds=sounds(), finite=False)
    assert total.isnan().tolist() == [True, True, False]
    assert [failure.text for failure in mixed.calls.failures] == ["a bell"]
