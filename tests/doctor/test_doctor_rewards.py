"""What `sfgrpo doctor` says of rewards whose weights are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfgrpo import config
from sfgrpo.doctor import rewards


def test_absent_weights_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    where = tmp_path / "gone"
    keys = {
        "reward": "{pickscore: 1, colour: 1, 'tests.support.rewards:Redness': 1}",
        "reward_options": f"{{pickscore: {{model: {where}}}}}",
    }
    found = rewards.problems(config.load("embedded", list(keys.items())))
    assert [(problem.what, problem.remedy, problem.fatal) for problem in found] == [
        (
            f"reward_options.pickscore.model: '{where}' does not exist",
            "correct reward_options.pickscore.model",
            True,
        ),
        (
            "reward_options.pickscore.processor: 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K' is not in "
            "the hub's cache here",
            "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            False,
        ),
    ]


def test_rewards_without_weights_have_none() -> None:
    assert rewards.problems(config.load("embedded", [])) == []
