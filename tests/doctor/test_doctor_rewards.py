"""What `sfgrpo doctor` says of rewards whose weights are absent, and what those here take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfgrpo import config
from sfgrpo.doctor import host, memory, rewards
from sfgrpo.doctor.footprint import bytes_of
from sfgrpo.doctor.memory import Network, Setting, Work
from sfgrpo.rewards import _sizes, build
from tests.support import clip


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
    assert rewards.taken(config.load("embedded", [])).told() == "no networks"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_networks_take_what_they_take_when_they_are_loaded(tmp_path: Path, dtype: str) -> None:
    options = {"model": clip.save(tmp_path / "clip"), "dtype": dtype, "device": "cpu"}
    reward: Any = build("clipscore", **options)
    network = reward._clip._network
    found = _sizes.size("clipscore", options)
    assert (found.device, found.absent) == ("cpu", ())
    positions = sum(buffer.nbytes for buffer in network.buffers())  # no file holds them
    assert found.bytes == bytes_of(network) - positions > 0


def test_a_pickle_and_shards_are_counted_without_being_read(tmp_path: Path) -> None:
    state = {"a": torch.zeros(8, 4, dtype=torch.float16), "b": torch.zeros(3, dtype=torch.int64)}
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    folder = Path(clip.save(tmp_path / "clip"))
    whole = _sizes.size("clipscore", {"model": str(folder)}).bytes
    both = {"model": str(folder), "head": str(tmp_path / "head.pth")}
    assert _sizes.size("aesthetic", both).bytes == whole + 4 * 32 + 8 * 3
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.fp16.safetensors").write_bytes(b"of another precision")
    (folder / _sizes.INDEX).write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', encoding="utf-8"
    )
    assert _sizes.size("clipscore", {"model": str(folder)}).bytes == whole


def test_rewards_count_where_they_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = clip.save(tmp_path / "clip")
    keys = {
        "reward": "{clipscore: 1, similarity: 1, pickscore: 1, 'tests.support.rewards:Redness': 1}",
        "reward_options": f"{{clipscore: {{model: {folder}}}, "
        f"similarity: {{model: {folder}, device: cpu, dtype: bf16}}}}",
    }
    taken = rewards.taken(config.load("embedded", list(keys.items())))
    assert taken.device == taken.passing == 2 * taken.host > 0
    assert taken.told().endswith(
        " in main memory; not counted: pickscore ('yuvalkirstain/PickScore_v1' is not here), "
        "tests.support.rewards:Redness (one's own)"
    )


def test_rewards_are_there_all_the_time() -> None:
    network, setting = Network(elements=8, trained=8, largest=8, widest=8), Setting(world=8)
    without = Work(embeds_alone=True)
    scored = replace(without, rewards=5, rewards_host=3, rewards_passing=4)
    one, two = (memory.phases(network, setting, work) for work in (without, scored))
    assert two == {name: needed + 5 for name, needed in one.items()}
    one, two = (host.phases(network, setting, work, 8) for work in (without, scored))
    assert two.pop("rewards") == 8 * (host.PROCESS + 3 + 4)
    assert two == {name: needed + 8 * 3 for name, needed in one.items()}
