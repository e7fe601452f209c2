"""Trackers get the run's numbers, the same run when it continues, and cannot stop it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfgrpo import cli, config
from sfgrpo.run import records, tracking
from sfgrpo.run.tracking import Tracking, starters
from sfgrpo.trainer import Trainer
from tests.support import trackers
from tests.support.rewards import Crash, Redness

Make = Callable[..., config.Recipe]
KEEPING, FAILING = "tests.support.trackers:keeping", "tests.support.trackers:failing"


@pytest.fixture(autouse=True)
def _told() -> None:
    trackers.TOLD.clear()


def loaded(track: str, options: str = "{}") -> config.Recipe:
    return config.load("embedded", [("run.track", track), ("run.track_options", options)])


def begin(folder: Path, recipe: config.Recipe) -> Tracking:
    return Tracking(starters(recipe), folder, recipe)


def test_a_run_that_continues_is_the_same_tracked_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path / "digits", run__track=f"['{KEEPING}']", run__iterations="2")
    monkeypatch.setattr(Redness, "crash_at", Redness.calls + 8)
    with pytest.raises(Crash):
        Trainer(given).train()
    assert trackers.TOLD[-1] == ("finish", True)
    Trainer(given).train()
    assert trackers.TOLD[-1] == ("finish", False)
    first, second = (row[1] for row in trackers.TOLD if row[0] == "start")
    assert (first.name, first.resumed, second.resumed) == ("digits", False, True)
    assert first.id == second.id
    assert len(first.id) == tracking.ID_LENGTH
    logged = {
        (row[1], name): value
        for row in trackers.TOLD if row[0] == "log" for name, value in row[2].items()
    }  # fmt: skip
    for log in ("metrics", "eval"):
        for row in records.read(tmp_path / "digits" / f"{log}.jsonl"):
            assert logged[row["iteration"], f"{log}/reward"] == row["reward"]
    (kept,) = [row["alarms"] for row in records.read(tmp_path / "digits" / "eval.jsonl")][-1:]
    assert logged[2, "eval/alarms/diversity"] == kept["diversity"]
    assert ("metrics/gain_per_step" in str(logged)) is False
    Trainer(given, fresh=True)
    assert trackers.TOLD[-1][1].id != first.id


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_called_no_more(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", "hidden-1234")
    options = f"{{'{FAILING}': {{when: {when}, secret: hidden-1234}}}}"
    given = loaded(f"['{FAILING}', '{KEEPING}']", options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = begin(tmp_path, given)
        run.log(1, {"a": 1.0})
        run.log(2, {"a": 2.0})
        run.finish(failed=False)
    (message,) = [str(warning.message) for warning in told]
    assert f"run.track: '{FAILING}' failed and gets nothing more of this run" in message
    assert "trackers.py, line" in message
    assert "no answer for the key ***" in message
    calls = [row[0] for row in trackers.TOLD]
    assert [call for call in calls if "failing" not in call] == ["start", "log", "log", "finish"]
    assert calls.count(f"failing {when}") == 1


def test_a_tracker_that_leaves_does_not_take_the_run_along(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SystemExit: 3"):
        begin(tmp_path, loaded("['tests.support.trackers:leaving']"))


def test_without_trackers_nothing_is_kept_or_told(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = begin(tmp_path, config.load("embedded"))
        run.log(1, {"a": 1.0})
        run.finish(failed=False)
    assert list(tmp_path.iterdir()) == []


def test_secrets_of_a_recipe_are_not_tracked(tmp_path: Path) -> None:
    options = f"{{'{KEEPING}': {{project: p}}}}"
    given = loaded(f"['{KEEPING}']", options)
    begin(tmp_path, given)
    (_, run, project), *_ = trackers.TOLD
    assert project == "p"
    assert run.config["train"]["learning_rate"] == given.train.learning_rate
    hidden: Any = {
        "api_key": "a", "x": [{"HF_TOKEN": "b", "tokens": 3}], "keyed": "c", "apikey": "d",
    }  # fmt: skip
    assert tracking.without_secrets(hidden) == {
        "api_key": "***", "x": [{"HF_TOKEN": "***", "tokens": 3}], "keyed": "c", "apikey": "***",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("track", "options", "message"),
    [
        ("[wandv]", "{}", "run.track: unknown tracker 'wandv'; did you mean 'wandb'"),
        ("[wandb]", "{swanlab: {}}", "unknown tracker in track_options 'swanlab'"),
    ],
)
def test_wrong_names_are_refused_with_the_recipe(track: str, options: str, message: str) -> None:
    with pytest.raises(config.RecipeError, match=message):
        loaded(track, options)


def test_wrong_options_and_missing_packages_are_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="unknown option 'projekt'; did you mean 'project'"):
        starters(loaded(f"['{KEEPING}']", f"{{'{KEEPING}': {{projekt: x}}}}"))


def test_where_numbers_go_may_change_when_a_run_continues(tmp_path: Path) -> None:
    records.prepare(tmp_path, config.load("embedded"), fresh=False)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    changed = loaded(f"['{KEEPING}']", f"{{'{KEEPING}': {{project: p}}}}")
    assert records.differences(tmp_path, changed) == []
    assert records.identity(changed) == records.identity(config.load("embedded"))


def test_a_missing_package_says_which_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, recipe: Make, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "sfgrpo.track.wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tmp_path / "run", run__track="[wandb]").model_dump_json())
    assert cli.main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tracker 'wandb' cannot be imported" in line
    assert line.endswith('; pip install ".[track]"')
    assert not (tmp_path / "run" / "checkpoints").exists()
