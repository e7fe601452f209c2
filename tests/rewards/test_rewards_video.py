"""Rewards of videos, whole or frame by frame, and of samples that are neither."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfgrpo import config, rewards


class Recorder:
    """The mean of a sample, and what it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.metadata: list[rewards.Metadata] = []

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[rewards.Metadata]
    ) -> Tensor:
        self.shapes.append(tuple(images.shape))
        self.prompts += prompts
        self.metadata += metadata
        return images.flatten(1).mean(1)


class Whole(Recorder):
    takes_video = True


class Failing(Recorder):
    """Not a number where a frame is all zeros."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[rewards.Metadata]
    ) -> Tensor:
        means = super().__call__(images, prompts, metadata)
        return torch.where(means == 0, torch.nan, means)


def videos(count: int, frames: int) -> Tensor:
    """[B, F, 3, 2, 2] in which frame f of video b is 100 b + f all over."""
    values = 100.0 * torch.arange(count)[:, None] + torch.arange(frames)
    return values[:, :, None, None, None].expand(-1, -1, 3, 2, 2)


def mixture(reward: rewards.Reward, frames: int = 8) -> rewards.Mixture:
    return rewards.Mixture({"it": reward}, {"it": 1.0}, frames=frames)


@pytest.mark.parametrize(
    ("count", "available", "expected"),
    [
        (8, 5, [0, 1, 2, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 5, [0, 2, 4]),
        (2, 81, [0, 80]),
        (5, 81, [0, 20, 40, 60, 80]),
        (4, 6, [0, 2, 3, 5]),
        (1, 9, [4]),
        (1, 1, [0]),
    ],
)
def test_frames_are_spread_evenly(count: int, available: int, expected: list[int]) -> None:
    assert rewards.evenly(count, available) == expected


def test_frames_are_distinct_and_keep_both_ends() -> None:
    for available in range(2, 40):
        for count in range(2, 50):
            chosen = rewards.evenly(count, available)
            assert chosen == sorted(set(chosen))
            assert (chosen[0], chosen[-1]) == (0, available - 1)
            assert len(chosen) == min(count, available)
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert max(gaps) - min(gaps) <= 1


def test_a_reward_of_images_sees_frames_and_the_video_gets_their_mean() -> None:
    reward = Recorder()
    total, parts = mixture(reward, 3)(videos(2, 9), ["a", "b"], [{"n": 0}, {"n": 1}])
    assert total.tolist() == parts["it"].tolist() == [4, 104]
    assert reward.shapes == [(6, 3, 2, 2)]
    assert reward.prompts == ["a"] * 3 + ["b"] * 3
    assert reward.metadata == [{"n": 0}] * 3 + [{"n": 1}] * 3


def test_no_more_than_64_frames_at_once() -> None:
    reward = Recorder()
    count = 23
    total, _ = mixture(reward)(videos(count, 33), list(map(str, range(count))), [{}] * count)
    assert [shape[0] for shape in reward.shapes] == [64, 64, 56]
    assert reward.prompts == [str(b) for b in range(count) for _ in range(8)]
    assert total.tolist() == [100 * b + 16 for b in range(count)]


def test_images_of_one_call_stay_together() -> None:
    reward = Recorder()
    mixture(reward)(torch.zeros(100, 3, 2, 2), [""] * 100, [{}] * 100)
    assert reward.shapes == [(100, 3, 2, 2)]


def test_a_reward_of_videos_sees_all_of_them() -> None:
    whole, frames = Whole(), Recorder()
    mixed = rewards.Mixture({"whole": whole, "frames": frames}, {"whole": 2, "frames": 1}, frames=2)
    total, parts = mixed(videos(2, 9), ["a", "b"], [{}, {}])
    assert whole.shapes == [(2, 9, 3, 2, 2)]
    assert frames.shapes == [(4, 3, 2, 2)]
    assert total.tolist() == (2 * parts["whole"] + parts["frames"]).tolist() == [12, 312]


@pytest.mark.parametrize("shape", [(2, 16, 7), (2, 5), (2, 3, 4, 4)])
def test_other_samples_pass_unchanged(shape: tuple[int, ...]) -> None:
    for reward in (Recorder(), Whole()):
        mixture(reward)(torch.zeros(shape), ["a", "b"], [{}, {}])
        assert reward.shapes == [shape]


def test_no_video_is_no_call() -> None:
    reward = Recorder()
    total, _ = mixture(reward)(torch.empty(0, 9, 3, 2, 2), [], [])
    assert total.shape == (0,)
    assert not reward.shapes


def test_a_frame_that_is_not_finite_names_its_video_s_prompt() -> None:
    shown = videos(2, 9) + 1
    shown[1, 4] = 0
    with pytest.raises(ValueError, match="'it' is nan for prompt 'b'"):
        mixture(Failing(), 3)(shown, ["a", "b"], [{}, {}])
    total, _ = mixture(Failing(), 3)(shown, ["a", "b"], [{}, {}], finite=False)
    assert total.isnan().tolist() == [False, True]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="reward_frames: needs at least 1"):
        mixture(Recorder(), 0)
    with pytest.raises(ValueError, match=r"videos without frames: \(2, 0, 3, 2, 2\)"):
        mixture(Recorder())(torch.empty(2, 0, 3, 2, 2), ["a", "b"], [{}, {}])
    with pytest.raises(ValueError, match="2 videos, 1 prompts"):
        mixture(Recorder())(videos(2, 9), ["a"], [{}, {}])


def ready(*, height: int, width: int = 1) -> Recorder:
    return Recorder()


def plain() -> Recorder:
    return Recorder()


def test_options_come_from_the_recipe_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = config.load(
        "embedded",
        [("reward", "{ocr: 1}"), ("reward_options.ocr.threads", "1"), ("reward_frames", "3")],
    )
    loaded = rewards.load(recipe.reward, recipe.reward_options, frames=recipe.reward_frames)
    assert loaded.frames == 3
    with pytest.raises(config.RecipeError, match=r"reward_frames: .*greater than or equal to 1"):
        config.load("embedded", [("reward_frames", "0")])
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    assert rewards.build("mine:ready", height=3)
    with pytest.raises(ValueError, match="'mine:ready': unknown option 'hight'; did you mean 'hei"):
        rewards.build("mine:ready", hight=3)
    with pytest.raises(ValueError, match="'mine:ready': missing a required argument: 'height'"):
        rewards.build("mine:ready")
    with pytest.raises(ValueError, match="'mine:plain' has no options, got 'height'"):
        rewards.build("mine:plain", height=1)
