"""A failing reward never corrupts a run: retried without a trace, dropped with its group, or the
end of the run with all that is finished saved."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfgrpo import train
from sfgrpo.rewards import Calls, Failure, Mixture
from sfgrpo.run import failing, peers, records
from sfgrpo.trainer import Trainer
from tests.support import ranks, training
from tests.support.rewards import Flaky

CHANGES = {
    "reward": "{'tests.support.rewards:Flaky': 1}", "run__iterations": "2",
    "checkpoint": "{every: 9, keep: 1}",
    "eval": "{every: 9, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves whose reward never fails."""
    folder = tmp_path_factory.mktemp("sound")
    Trainer(recipe(folder, **CHANGES)).train()
    assert "reward_retries" not in (folder / "timing.jsonl").read_text()
    return written(folder)


@pytest.fixture(autouse=True)
def well(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"share": 0.0, "spoilt": None, "random": random.Random(1)}.items():
        monkeypatch.setattr(Flaky, name, value)


def written(folder: Path) -> dict[str, Any]:
    """Logs, byte for byte, and averages of a run's last checkpoint."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    logs = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("metrics", "eval")}
    averages = load_file(newest / "ema.safetensors")
    return {**logs, **{name: value.numpy().tobytes() for name, value in averages.items()}}


def test_a_third_of_the_calls_may_fail(
    recipe, tmp_path: Path, sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "share", 0.3)
    monkeypatch.setattr(Flaky, "failed", 0)
    Trainer(recipe(tmp_path, **CHANGES, reward_retries="30")).train()
    assert Flaky.failed > 3
    assert written(tmp_path) == sound
    timing = records.read(tmp_path / "timing.jsonl")
    assert 0 < sum(row["reward_retries"] for row in timing) <= Flaky.failed


def test_groups_that_no_reward_scores_are_left_out(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change nothing: as if their rewards were not finite."""
    monkeypatch.setattr(Flaky, "spoilt", "seven")
    given = recipe(
        tmp_path, **CHANGES, on_reward_failure="drop_group", sample__prompts_per_iteration="5"
    )
    with pytest.warns(UserWarning, match="without prompt 'a white seven .*environment is gone"):
        Trainer(given).train()
    rows = records.read(tmp_path / "metrics.jsonl")
    assert [(row["failed_groups"], row["dropped_groups"]) for row in rows] == [(1, 1)] * 2
    assert all(torch.tensor(row["reward"]).isfinite() for row in rows)


@pytest.mark.filterwarnings("ignore:goes on without prompt")
@pytest.mark.parametrize("policy", ["stop", "drop_group"])
def test_a_reward_that_is_gone_stops_the_run_with_a_checkpoint(
    recipe, tmp_path: Path, sound: dict[str, Any], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From which it goes on. Where groups are dropped, it stops once none is left."""
    trainer = Trainer(recipe(tmp_path, **CHANGES, on_reward_failure=policy))
    iterate = trainer.iterate

    def and_then_it_dies(*given: Any) -> dict[str, Any]:
        metrics = iterate(*given)
        monkeypatch.setattr(Flaky, "spoilt", "white")
        return metrics

    monkeypatch.setattr(trainer, "iterate", and_then_it_dies)
    message = r"reward 'tests.support.rewards:Flaky' failed on prompt 'a white .*OSError: the env"
    with pytest.raises(failing.RewardFailed, match=message):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000001"]
    if policy == "stop":
        monkeypatch.setattr(Flaky, "spoilt", None)
        Trainer(recipe(tmp_path, **CHANGES)).train()
        assert written(tmp_path) == sound


@pytest.mark.filterwarnings("ignore:goes on without prompt")
@pytest.mark.parametrize("policy", ["stop", "drop_group"])
def test_an_evaluation_stops_with_a_checkpoint_too(
    recipe,
    tmp_path: Path,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(Flaky, "spoilt", "white")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tmp_path / "run", **CHANGES, on_reward_failure=policy).model_dump_json())
    assert train.main([str(path)]) == 1
    *_, told = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("sfgrpo.train: ")
    assert told.endswith("OSError: the environment is gone")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000"]


def test_what_failed_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flaky: Any = Flaky()
    mixed = Mixture({"r": flaky}, {"r": 1.0}, calls=Calls(policy="drop_group"))
    mixed.calls.failures += [Failure("a", "why"), Failure("a", "why")]
    with pytest.warns(UserWarning, match="without prompt 'a': why") as warned:
        assert len(failing.settle(mixed, "drop_group")) == 2
    assert len(warned) == 1
    assert failing.settle(mixed, "stop") == []
    mixed.calls.failures.append(Failure("a", "why"))
    with pytest.raises(failing.RewardFailed, match=r"^why$"):
        failing.settle(mixed, "stop")


def spoilt_on_one(recipe: Any) -> tuple[str, list[str]]:
    """What a rank says of a reward that fails on rank 1 alone."""
    from sfgrpo import engine

    Flaky.spoilt = "white" if engine.start().type and engine.rank() else None
    trainer = Trainer(recipe)
    with pytest.raises(failing.RewardFailed) as stopped:
        trainer.train()
    engine.barrier()
    return str(stopped.value), sorted(p.name for p in trainer.progress.checkpoints.folder.iterdir())


@pytest.mark.slow
def test_ranks_stop_together(recipe, tmp_path: Path) -> None:
    target = "tests.run.test_failing:spoilt_on_one"
    (one, saved), (two, _) = ranks.run(target, 2, recipe(tmp_path, **CHANGES))
    assert one == two
    assert "OSError: the environment is gone" in one
    assert saved == ["000000"]


@pytest.mark.slow
def test_a_reward_that_hangs_ends_the_process_and_is_named(recipe, tmp_path: Path) -> None:
    """The checkpoint before it stays; the reason stands in the folder."""
    changes = {**CHANGES, "reward": "{'tests.support.rewards:Hangs': 1}"}
    changes |= {"checkpoint": "{every: 1}", "eval": CHANGES["eval"].replace("9", "1")}
    given = recipe(tmp_path / "run", **changes, reward_timeout="2")
    run = training.command_line(given, tmp_path, sys.executable, "-m")
    said, _ = run.communicate(timeout=280)
    assert run.returncode == peers.STATUS, said
    told = "the run ends: reward 'tests.support.rewards:Hangs' has not returned for 2 s"
    assert told in said
    assert "tests/support/rewards.py, line" in said
    assert (tmp_path / "run" / peers.REASON).read_text().startswith(told[14:])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]
