"""A run's recipe means the same files and modules wherever it is used from, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfgrpo import cli, config, train
from sfgrpo.run import origin, records

NAMES = {
    "prompts": "mine.jsonl",
    "model.path": "models/mine",
    "lora.path": "adapters",
    "reward": "{'judge_of_mine:score/a': 1}",
    "reward_options": "{'judge_of_mine:score/a': {weights: {file: head.pt}}}",
    "eval.judges": "['judges_of_mine.all:one']",
}
"""What a recipe may name in the folder where its run is started."""
SAID = {
    "prompts 'mine.jsonl'", "model.path 'models/mine'", "lora.path 'adapters'",
    "reward 'judge_of_mine:score/a'", "eval.judges 'judges_of_mine.all:one'",
    "reward_options.judge_of_mine:score/a.weights.file 'head.pt'",
}  # fmt: skip


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that, and a run that began there."""
    home = tmp_path / "home"
    for folder in ("models/mine", "adapters", "judges_of_mine"):
        (home / folder).mkdir(parents=True)
    for file in ("mine.jsonl", "judge_of_mine.py", "head.pt", "embedded"):
        (home / file).touch()
    monkeypatch.chdir(home)
    recipe = config.load("embedded", [*NAMES.items(), ("run.output_dir", str(home / "run"))])
    records.prepare(home / "run", recipe, fresh=False)
    origin.keep(home / "run")
    (home / "run" / "metrics.jsonl").write_text('{"iteration": 1}\n')
    return home


def test_what_is_not_there_or_another_is_named_with_both_folders(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = started / "run", tmp_path / "here"
    recipe = config.load(str(run / "recipe.yaml"))
    origin.check(run, recipe)
    here.mkdir()
    (here / "mine.jsonl").write_text("{}")  # another of the same name
    monkeypatch.chdir(here)
    monkeypatch.setattr(origin, "LISTED", 9)
    with pytest.raises(ValueError, match=f"started in '{started}'.*from '{here}': give") as told:
        origin.check(run, recipe)
    assert all(name in str(told.value) for name in SAID)
    assert str(told.value).count(", ") == len(SAID)
    origin.check(run, recipe, given=["prompts", "model", "lora.path", "reward", "eval.judges",
                                     "reward_options"])  # fmt: skip
    for name in ("mine.jsonl", "models", "adapters", "judges_of_mine", "judge_of_mine.py",
                 "head.pt"):  # fmt: skip
        (here / name).unlink(missing_ok=True)
        (here / name).symlink_to(started / name)
    origin.check(run, recipe)
    (here / "mine.jsonl").unlink()
    (here / "mine.jsonl").touch()  # a copy
    origin.check(run, recipe)


def test_what_depends_on_no_folder_is_used_anywhere(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets and models of ours, whatever lies there under their names; modules that are installed;
    a run whose folder is not there, or was not kept."""
    ours = config.load("embedded", [("eval.judges", "['pytest:main']")])
    (started / "pytest.py").touch()
    monkeypatch.chdir(tmp_path)
    origin.check(started / "run", ours)
    mine = config.load(str(started / "run" / "recipe.yaml"))
    for said in (json.dumps("/nowhere"), None):
        kept = started / "run" / records.STARTED_IN
        kept.write_text(said) if said else kept.unlink()
        origin.check(started / "run", mine)


@pytest.mark.parametrize("command", ["evaluate", "probe", "train"])
def test_every_command_that_uses_a_run_refuses(
    command: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if command == "train":
        status = train.main([str(started / "run" / "recipe.yaml")])
    else:
        status = cli.main([command, str(started / "run")])
    assert status == 2
    assert f"'{started / 'run'}' was started in '{started}'" in capsys.readouterr().err
    records.discard(started / "run")
    assert not (started / "run" / records.STARTED_IN).exists()
