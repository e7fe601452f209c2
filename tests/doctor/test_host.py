"""What the doctor says of a node's main memory, beside what a run really takes there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfgrpo import backbones, config
from sfgrpo.doctor import examination, footprint, host, memory
from sfgrpo.doctor.machine import GIB
from sfgrpo.doctor.memory import Network, Setting, Work
from sfgrpo.doctor.variants import Room
from sfgrpo.trainer import Trainer
from tests.support import families

N = 2**30
NETWORK = Network(elements=14 * N, trained=N, largest=N, widest=N)
WORK = Work(encoders=10 * GIB, others=11 * GIB)
EIGHT = Setting(stage=2, world=8, dtype="bf16")


def phases(setting: Setting = EIGHT, work: Work = WORK, **device: int) -> dict[str, float]:
    """GiB beside those of the processes of eight ranks."""
    found = host.phases(NETWORK, setting, work, 8, **device)
    return {name: (needed - 8 * host.PROCESS) / GIB for name, needed in found.items()}


def test_who_reads_what() -> None:
    assert phases()["loading"] == 8 * (1 + 10 + 28)
    shared = replace(EIGHT, stage=3)
    assert phases(shared)["loading"] == 8 * (1 + 10) + 28
    cached = replace(WORK, others=GIB, embeds_alone=True)
    assert phases(shared, cached)["loading"] == 8 * 1 + 28
    assert phases(shared, cached)["embedding"] == 8 * 10
    copied = replace(shared, reference=True)
    assert phases(copied) == phases(shared)  # on the devices
    assert phases(replace(copied, offload_parameters=True))["loading"] == 8 * (1 + 10) + 28 + 28
    assert phases(copied, device=5 * GIB)["loading"] == 8 * (1 + 10) + 28 + 28


def test_what_stays_there() -> None:
    assert phases()["training"] == 0
    waiting = replace(WORK, others=GIB, waiting=10 * GIB)
    assert phases(work=waiting)["training"] == 80
    assert phases(device=5 * GIB)["training"] == 40
    moved = replace(EIGHT, offload_optimizer=True)
    assert phases(moved)["training"] == 8 * memory.held(NETWORK, moved).host / GIB > 0


def test_what_a_checkpoint_takes() -> None:
    """Adapters of N weights in bf16, of which every rank steps an eighth in fp32."""
    assert phases()["saving"] == max(2 * 2, 8 * 4 / 8)
    averaged = replace(EIGHT, ema=True)
    assert phases(averaged)["saving"] == 4 + 4
    moved = replace(averaged, offload_optimizer=True)
    assert phases(moved)["saving"] - phases(moved)["training"] == 4 + 4 + 8 * 4 / 8


def test_too_little_is_a_problem_with_a_way_out() -> None:
    """312 GiB of text encoders, decoders and networks; 116 where one rank reads the network."""
    report = examination.Report()
    room = Room(device=80 * GIB, host=200 * GIB, ranks=8)
    examination._judge(report, NETWORK, WORK, EIGHT, room)
    (problem,) = report.problems
    told = "the 8 ranks of a node need 315.12 GiB of its main memory while in phase 'loading'"
    assert problem.what.startswith(told)
    assert problem.remedy == "this would fit: deepspeed.zero_stage 3"
    report = examination.Report()
    examination._judge(report, NETWORK, WORK, EIGHT, replace(room, host=None))
    examination._judge(report, NETWORK, WORK, EIGHT, replace(room, host=400 * GIB))
    assert not report.problems


def test_loading_is_what_is_read(tmp_path: Path) -> None:
    """Files in fp32, a run in bf16: whole where the rank reads it, nothing where another does."""
    folder = families.save("sd3", tmp_path / "sd3")
    taken = {}
    for weights in ("host", "absent"):
        with footprint.Ledger() as ledger:
            given: Any = {"text_encoders": "absent", "weights": weights, "dtype": torch.bfloat16}
            backbone: Any = backbones.load("sd3", folder, **given)
            taken[weights] = ledger.now
    network, decoder = backbone.transformer, footprint.bytes_of(backbone.pipeline.vae)
    setting, work = Setting(stage=3, world=2, dtype="bf16"), Work(others=decoder)
    found = host.phases(footprint.counts(network), setting, work, 1)["loading"] - host.PROCESS
    assert taken["host"] == pytest.approx(found, rel=0.02)
    assert taken["absent"] - decoder < 0.1 * (found - decoder)  # buffers


def test_saving_is_what_is_written(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)  # stage 3 replaces it
    given: config.Recipe = recipe(
        tmp_path, lora="null", train__ema_decay="0.5", train__beta="0", deepspeed="{zero_stage: 3}"
    )
    network, (work,) = footprint.measure(given, 1, (False,))
    trainer = Trainer(given)
    assert trainer.ema
    stepped: Any = trainer.engine.masters
    shards = [parameter.ds_tensor for parameter in stepped.parameters.values()]
    taken: dict[str, int] = {}
    with footprint.Ledger() as ledger:
        for held in (*stepped.shares, *trainer.ema.average, *shards):
            ledger.add(held)
        with ledger.above(taken, "saving"):
            trainer.progress.save()
    asked = examination.setting(given, network, world=1)
    found = host.phases(network, asked, work, 1, device=0)
    assert taken["saving"] == pytest.approx(found["saving"] - found["training"], rel=0.1)
