"""What ZeRO does to a recipe: the values, and that the engine and the doctor use the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sfgrpo import config, zero
from sfgrpo.doctor import examination, footprint, memory
from sfgrpo.doctor.memory import Network
from sfgrpo.engine import configuration, sharded


def recipe(dtype: str, stage: int, gather: str = "auto") -> config.Recipe:
    keys = {
        "model.dtype": dtype, "deepspeed.zero_stage": str(stage),
        "deepspeed.gather_for_sampling": gather,
    }  # fmt: skip
    return config.load("embedded", list(keys.items()))


@pytest.mark.parametrize(
    ("dtype", "runs"), [("fp32", [0, 1, 2, 3]), ("bf16", [1, 1, 2, 3]), ("fp16", [1, 1, 2, 3])]
)
def test_the_stage_that_runs(dtype: str, runs: list[int]) -> None:
    given = [recipe(dtype, stage) for stage in range(4)]
    assert [zero.stage(r) for r in given] == runs
    assert [zero.shards_parameters(r) for r in given] == [False, False, False, True]


def test_buckets_and_what_stays_gathered() -> None:
    assert zero.bucket(1600, 30) == 100
    assert zero.bucket(1600, 300) == 300  # the largest parameter fits in
    assert zero.bucket(16 * 10**10, 10) == 500_000_000
    assert zero.bucket(0, 0) == 1  # nothing is trained
    assert zero.live(400) == 100
    assert zero.live(10**11) == 1_000_000_000


def test_auto_gathers_once_where_half_of_what_is_free_is_enough() -> None:
    assert zero.gathers_once("auto", 50, 100)
    assert not zero.gathers_once("auto", 51, 100)
    assert zero.gathers_once("auto", 51, None)  # a CPU
    for free in (None, 1, 10**9):
        assert zero.gathers_once("rollout", 50, free)
        assert not zero.gathers_once("layer", 50, free)


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("bf16", 0), ("bf16", 2), ("fp32", 3)])
def test_the_doctor_expects_what_the_engine_configures(dtype: str, stage: int) -> None:
    network = nn.Sequential(nn.Linear(8, 40), *(nn.Linear(40, 40) for _ in range(20)))
    network[1].requires_grad_(False)
    given = recipe(dtype, stage)
    configured = configuration.training(given, network, 1)["zero_optimization"]
    expected = examination.setting(given, footprint.counts(network), world=2)
    assert configured["stage"] == expected.stage
    assert configured["reduce_bucket_size"] == expected.bucket
    assert configured.get("stage3_max_live_parameters", 0) <= zero.LIVE


@pytest.mark.parametrize("mode", ["auto", "rollout", "layer"])
@pytest.mark.parametrize("room", [2, 3])
def test_the_doctor_gathers_as_the_engine(
    mode: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of `room` times the network's bytes, beside which both look for room."""
    network = nn.Linear(64, 64, bias=False)
    whole = memory.BYTES["fp32"] * 64 * 64
    counted = Network(elements=64 * 64, trained=64 * 64, largest=64 * 64)
    setting = examination.setting(recipe("fp32", 3, mode), counted, world=2, room=room * whole)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((room - 1) * whole, room * whole))
    assert sharded.gathers_once(mode, network) == setting.gathers
    assert setting.gathers == (mode == "rollout" or (mode == "auto" and room == 3))
