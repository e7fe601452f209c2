"""Rewards of clean estimates: the same whether or not they are computed while the next are made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from sfgrpo import config
from sfgrpo.backbones import Conditioning
from sfgrpo.run import records
from sfgrpo.run.clock import Clock
from sfgrpo.run.stopping import Signals
from sfgrpo.trainer import Trainer
from tests.support.rewards import Redness

Make = Callable[..., config.Recipe]


@pytest.mark.parametrize("decode_batch", ["5", "64"])
def test_a_run_is_the_same_to_the_last_bit(recipe: Make, tmp_path: Path, decode_batch: str) -> None:
    keys = {
        "run__iterations": "2", "model__decode_batch": decode_batch,
        "credit__solver": "by_level", "credit__solver_options": "{}",
    }  # fmt: skip
    for ahead in "013":
        Trainer(recipe(tmp_path / ahead, reward_ahead=ahead, **keys)).train()
    for log in ("metrics.jsonl", "eval.jsonl"):
        one, *others = ((tmp_path / ahead / log).read_bytes() for ahead in "013")
        assert others == [one, one]
    beside = [
        records.read(tmp_path / ahead / "timing.jsonl")[0]["beside"]["rewards"] for ahead in "013"
    ]
    assert beside[0] == 0 < min(beside[1:])


def test_rewards_are_computed_while_the_next_estimates_are(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first velocity for an estimate waits until a reward has begun, and the reward until it
    has been asked for: one after the other they would wait for ever."""
    begun, asked = threading.Event(), threading.Event()
    trainer = Trainer(
        recipe(tmp_path, run__iterations="1", eval="{every: 9, prompts: 2, judges: []}",
               reward_ahead="9", credit__solver_options="{substeps: 3}")
    )  # fmt: skip
    trainer.progress.state.evaluated = 0
    plain, score = trainer.backbone.velocity, Redness.__call__
    sampling = len(trainer.layout.schedule(0).table)
    calls = 0

    def velocity(transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == sampling + 1:
            asked.set()
            assert begun.wait(20)
        return plain(transformer, x, t, cond)

    def scored(self: Redness, *arguments: object) -> Tensor:
        begun.set()
        assert asked.wait(20)
        return score(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(trainer.backbone, "velocity", velocity)
    monkeypatch.setattr(Redness, "__call__", scored)
    trainer.iterate(Clock(), Signals())
    assert begun.is_set()


@pytest.mark.parametrize("ahead", ["0", "2"])
def test_what_a_reward_raises_ends_the_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    def broken(self: Redness, *arguments: object) -> Tensor:
        raise ZeroDivisionError("no colour")

    monkeypatch.setattr(Redness, "__call__", broken)
    with pytest.raises(Exception, match=r"Redness.*no colour"):
        Trainer(recipe(tmp_path, reward_ahead=ahead)).train()
    assert not any(thread.name.startswith("rewards") for thread in threading.enumerate())
