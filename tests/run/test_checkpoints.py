"""Checkpoints: whole or not there, verified, pruned; runs that are told to stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sfgrpo import config, files, train
from sfgrpo.engine.stored import Files
from sfgrpo.run import checkpoints, records
from sfgrpo.run.checkpoints import CheckpointError, Checkpoints, State
from sfgrpo.run.randomness import reseed
from sfgrpo.run.stopping import Signals
from sfgrpo.trainer import Trainer
from tests.support.rewards import Redness

Make = Callable[..., config.Recipe]


def write(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(os.urandom(64))
    (folder / "ema").write_bytes(b"average")


def filled(folder: Path, count: int = 3, keep: int = 2) -> Checkpoints:
    made = Checkpoints(folder, keep)
    for iteration in range(1, count + 1):
        made.save(State(iteration=iteration, best_reward=0.1 + 0.2), write, lambda: None)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_are_kept_with_their_state(tmp_path: Path) -> None:
    made = filled(tmp_path)
    assert names(tmp_path) == ["000002", "000003"]
    newest = made.newest()
    assert newest is not None
    assert newest.name == "000003"
    assert checkpoints.load_state(newest) == State(iteration=3, best_reward=0.1 + 0.2)
    assert json.loads((newest / "manifest.json").read_text())["files"].keys() == {
        "ema", "model/weights", "state.json",
    }  # fmt: skip


DAMAGE = {
    "manifest.json is missing": lambda f: (f / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda f: (f / "manifest.json").write_text('{"files": {"em'),
    "model/weights is missing": lambda f: (f / "model" / "weights").unlink(),
    "model/weights has 3 bytes, 64 were written": (
        lambda f: (f / "model" / "weights").write_bytes(b"abc")
    ),
    "ema has other contents than were written": lambda f: (f / "ema").write_bytes(b"averagf"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path: Path, problem: str) -> None:
    made = filled(tmp_path)
    DAMAGE[problem](tmp_path / "000003")
    with pytest.warns(UserWarning, match=rf"000003: {problem}.*continues from 000002") as warned:
        assert made.newest() == tmp_path / "000002"
    assert len(warned) == 1
    assert names(tmp_path) == ["000002", "damaged-000003"]
    DAMAGE[problem](tmp_path / "000002")
    for _ in range(2):  # nothing is thrown away: it says the same again
        with pytest.raises(CheckpointError, match=f"every checkpoint is damaged.*{problem}"):
            made.newest()


def test_a_checkpoint_that_cannot_be_written_says_what_is_left(tmp_path: Path) -> None:
    made, torn = filled(tmp_path, count=2), "unexpected pos 64 vs 0"

    def fails(_: Path) -> None:
        def full(*_: object, **__: object) -> None:
            raise RuntimeError(torn)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "save", full)
            Files().save({}, "model.pt")

    for save, name in ((made.save, "000003"), (made.save_best, "best")):
        with pytest.raises(CheckpointError, match=rf"writing-{name}'.*'model.pt' .*{torn}.* MiB"):
            save(State(iteration=3), fails, lambda: None)
    assert made.newest() == tmp_path / "000002"


class Kill(BaseException):
    """Stands for SIGKILL: nothing cleans up."""


def test_a_kill_at_any_call_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the k-th change to the disk of a save, for every k; what a start
    finds then is the checkpoint before or the new one, whole, and the best weights are there."""
    changes = 0
    last = 0

    def counted(function: Callable) -> Callable:
        def call(*args: object, **keys: object) -> object:
            nonlocal changes
            changes += 1
            if changes == last:
                raise Kill
            return function(*args, **keys)

        return call

    def interrupted(made: Checkpoints) -> bool:
        nonlocal changes
        changes = 0
        with monkeypatch.context() as patched:
            for place, name in (
                (os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"),
                (files, "write"), (Path, "write_bytes"),
            ):  # fmt: skip
                patched.setattr(place, name, counted(getattr(place, name)))
            try:
                made.save(State(iteration=3), write, lambda: None)
                made.save_best(State(best_iteration=3), write, lambda: None)
            except Kill:
                return True
        return False

    found = set()
    while True:
        last += 1
        shutil.rmtree(tmp_path)
        made = filled(tmp_path, count=2)
        made.save_best(State(best_iteration=2), write, lambda: None)
        killed = interrupted(made)
        again = Checkpoints(tmp_path, keep=2)
        again.clean()
        newest = again.newest()
        assert newest is not None
        found.add(newest.name)
        assert not checkpoints.damage(tmp_path / "best")
        assert not [name for name in names(tmp_path) if "ing-" in name or "damaged" in name]
        again.save(State(iteration=4), write, lambda: None)
        assert len(again.saved()) == 2
        if not killed:
            break
    assert last > 30
    assert found == {"000002", "000003"}


def test_what_others_draw_is_repeated() -> None:
    """By a run that continues at an iteration; not by another iteration, rank or seed."""

    def draws(seed: int, iteration: int, rank: int) -> tuple[float, ...]:
        reseed(seed, iteration, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws(0, 5, 0)
    assert draws(0, 5, 0) == first
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1), (2**62, 5, 0)):
        assert not set(draws(*other)) & set(first)


def test_stages_that_shard_go_on_as_one_another() -> None:
    def refusal(saved: int, now: int) -> str | None:
        return checkpoints.refusal(State(world=4, zero_stage=saved), zero_stage=now)

    assert all(refusal(saved, now) is None for saved in (1, 2, 3) for now in (1, 2, 3))
    assert refusal(0, 0) is None
    assert "stage 1, this run is at 0, and only stages 1 to 3 go on as one" in str(refusal(1, 0))
    assert "go on with --deepspeed.zero_stage 0" in str(refusal(0, 3))


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_continues(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Told before its first iteration, in the middle of an iteration, and in an evaluation."""
    changes = {"checkpoint": "{every: 100, keep_best: true}"}
    monkeypatch.setattr(Redness, "calls", 0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(recipe(whole, **changes)).train()
    for number, call, done in (
        (signal.SIGTERM, 1, 0), (signal.SIGINT, 3, 0), (signal.SIGTERM, 10, 2)
    ):  # fmt: skip
        monkeypatch.setattr(Redness, "calls", 0)
        monkeypatch.setattr(Redness, "signal_at", call)
        monkeypatch.setattr(Redness, "signal", number)
        with Signals() as signals:
            given = recipe(cut, **changes)
            status = train._run(given, signals, fresh=False, prog="sfgrpo train", end=pytest.fail)
        assert status == 128 + number
        told = capsys.readouterr().err
        assert f"{signal.Signals(number).name} after {done} iterations, which are saved" in told
        assert f"{done:06d}" in names(cut / "checkpoints")
    monkeypatch.setattr(Redness, "signal_at", None)
    Trainer(recipe(cut, **changes)).train()
    for log in ("metrics.jsonl", "eval.jsonl"):
        assert (cut / log).read_bytes() == (whole / log).read_bytes()
    for part in ("000003/ema.safetensors", "000003/state.json", "best/best.json"):
        parts = [folder / "checkpoints" / part for folder in (whole, cut)]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    best = max(records.read(cut / "eval.jsonl"), key=lambda row: row["reward"])
    described = json.loads((cut / "checkpoints" / "best" / "best.json").read_text())
    assert described == {key: best[key] for key in ("reward", "iteration")}
