"""Which two trajectories are kept as pictures, and how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfgrpo.prompts import Prompt
from sfgrpo.rollout import Trajectories
from sfgrpo.run import strips
from tests.support import rollouts
from tests.support.toy import PointBackbone


def test_the_pair_with_equal_ends_and_different_ways_is_chosen() -> None:
    rewards = torch.tensor(
        [
            [0.0, 0.2, 0.9], [0.0, 0.8, 0.3],  # different ways and ends
            [0.1, 0.9, 0.5], [0.1, 0.1, 0.5], [0.1, 0.5, 0.5],
        ]
    )  # fmt: skip
    groups = torch.tensor([0, 0, 1, 1, 1])
    members, contrast = strips.choose(rewards, groups)
    assert sorted(members) == [2, 3]
    assert contrast == pytest.approx(0.4)
    rewards[2, 0] = torch.nan
    members, _ = strips.choose(rewards, groups)
    assert sorted(members) == [3, 4]


def test_without_a_pair_the_one_that_moves_most_is_chosen() -> None:
    rewards = torch.tensor([[0.0, 0.1], [0.0, -0.5], [torch.nan, 9.0]])
    assert strips.choose(rewards, torch.arange(3)) == ([1], 0.0)
    assert strips.choose(rewards[2:], torch.arange(1)) == ([], 0.0)
    same = torch.zeros(2, 3)
    members, _ = strips.choose(same, torch.zeros(2, dtype=torch.long))
    assert sorted(members) == [0, 1]


class Film(PointBackbone):
    """Makes videos of three frames, the middle one twice as large as it may stay."""

    modality = "video"

    def decode(self, latents: Tensor) -> Tensor:
        x = super().decode(latents).repeat_interleave(100, -1).repeat_interleave(50, -2)
        return torch.stack([0 * x, x, 0 * x + 1], 1)


def keep(folder: Path, backbone: PointBackbone) -> tuple[Trajectories, Tensor]:
    field = rollouts.field()
    made = rollouts.run(field)
    finished = rollouts.finished(field, made)
    rewards = finished.mean((2, 3, 4))
    strips.keep(
        folder, 7, backbone, made, rewards, rollouts.plan(), states=list(range(7)),
        levels=rollouts.levels(field), prompts=[Prompt(c, {}) for c in "abc"],
    )  # fmt: skip
    return made, finished


@pytest.mark.parametrize("decode_batch", [3, 64])
def test_pictures_are_the_clean_estimates(tmp_path: Path, decode_batch: int) -> None:
    backbone = PointBackbone()
    backbone.decode_batch = decode_batch
    _, finished = keep(tmp_path, backbone)
    said = json.loads((tmp_path / "strips" / "000007.json").read_text())
    members, contrast = strips.choose(finished.mean((2, 3, 4)), rollouts.plan().group_of_M)
    assert said["prompt"] == "abc"[members[0] // rollouts.SIZE]
    assert said["states"] == list(range(7))
    assert said["levels"][0] == 1
    assert said["levels"][-1] == 0
    assert said["contrast"] == contrast
    assert said["rewards"] == finished.mean((2, 3, 4))[members].tolist()
    grid = np.asarray(Image.open(tmp_path / "strips" / "000007.png"))
    expected = (backbone.decode(finished[members].flatten(0, 1)) * 255).round()
    cells = grid.reshape(2, 4, 7, 4, 3).transpose(0, 2, 4, 1, 3).reshape(14, 3, 4, 4)
    assert np.array_equal(cells, expected.numpy())


def test_of_a_video_the_middle_frame_is_kept_and_made_small(tmp_path: Path) -> None:
    keep(tmp_path, Film())
    with Image.open(tmp_path / "strips" / "000007.png") as grid:
        assert grid.size == (7 * strips.SIDE, 2 * strips.SIDE // 2)
        assert 40 < np.asarray(grid).mean() < 215  # neither the black nor the white frame


def test_what_is_no_picture_or_has_no_gains_is_not_kept(tmp_path: Path) -> None:
    backbone = PointBackbone()
    backbone.modality = "other"
    keep(tmp_path, backbone)
    field = rollouts.field()
    made = rollouts.run(field, states=())
    strips.keep(
        tmp_path, 1, PointBackbone(), made, torch.zeros(12, 1), rollouts.plan(), states=[6],
        levels=[0.0], prompts=[],
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
