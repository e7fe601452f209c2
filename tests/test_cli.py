"""Command lines: keys before the recipe, and what is wrong said in one line with status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sfgrpo import arguments, cli, config, train
from sfgrpo.doctor import examination
from sfgrpo.embedded.pretrain import pretrain


@pytest.mark.parametrize(
    "given",
    [
        ["embedded", "--run.seed", "7", "--lora=null"],
        ["--run.seed", "7", "embedded", "--lora", "null"],
        ["--run.seed=7", "--lora", "null", "embedded"],
    ],
)
def test_keys_stand_before_or_after_the_recipe(
    given: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["show", *given]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["run"]["seed"], shown["lora"]) == (7, None)
    asked: list[Any] = []

    def load(recipe: str, overrides: list[tuple[str, str]]) -> None:
        asked.append((recipe, dict(overrides)))
        raise ValueError("enough")

    monkeypatch.setattr(config, "load", load)
    monkeypatch.setattr(examination, "load", load)
    assert cli.main(["train", "--local_rank=0", *given, "--fresh"]) == 2
    assert train.main(["--fresh", "--local_rank", "0", *given]) == 2
    assert cli.main(["doctor", "--json", *given, "--world", "2"]) == 2
    assert asked == [("embedded", {"run.seed": "7", "lora": "null"})] * 3


def test_values_may_look_like_options() -> None:
    found = arguments.apart(
        ["--a", "-1", "--fresh", "--b=--c", "r", "--d", "--ar 16:9", "--n", "-3"],
        flags=["--fresh"], valued=["--n"],
    )  # fmt: skip
    assert found.words == ["r"]
    assert found.options == ["--fresh", "--n", "-3"]
    assert found.pairs == [("a", "-1"), ("b", "--c"), ("d", "--ar 16:9")]
    with pytest.raises(ValueError, match="--lora needs a value"):
        arguments.apart(["r", "--lora", "--fresh"], flags=["--fresh"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("doctor --world -3", "doctor: --world: ranks to plan for must be at least 1, got -3"),
        ("doctor embedded --world 0", "doctor: --world: ranks to plan for must be at least 1"),
        ("doctor --device-memory -1", "doctor: --device-memory: must be GiB above 0, got -1.0"),
        ("doctor --device-memory nan", "doctor: --device-memory: must be GiB above 0, got nan"),
        ("doctor --host-memory 0", "doctor: --host-memory: must be GiB above 0, got 0.0"),
        ("doctor --run.seed 1", "doctor: --run.seed: a key needs its recipe, and none is given"),
        ("doctor embedded lora", "doctor: expected --key value, got 'lora'"),
        ("show embedded --run.seed", "show: --run.seed needs a value"),
        ("train {0}", "train: recipe '{0}' is a folder; give a .yaml file, or a name of"),
        ("train {0}/run", "train: recipe '{0}/run' is a folder; give '{0}/run/recipe.yaml'"),
        ("show {0}/a.yaml", "show: recipe '{0}/a.yaml' is a folder"),
        ("pretrain {0}/file", "pretrain: '{0}/file' cannot be made or written: File exists"),
        ("pretrain {0}/file/new", "pretrain: '{0}/file/new' cannot be made or written: Not a dir"),
        ("pretrain {0}/run", "pretrain: '{0}/run' is not empty"),
        ("pretrain {0}/new --steps 0", "pretrain: steps must be at least 1, got 0"),
        ("pretrain {0}/new --threads -1", "pretrain: threads must be at least 1, got -1"),
        ("report {0}/not/there", "report: '{0}/not/there' holds no run: there is no such folder"),
        ("compare {0}/a.yaml --out {0}/x.png", "compare: '{0}/a.yaml' holds no run"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.yaml").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    assert cli.main(given.format(tmp_path).split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("sfgrpo " + message.format(tmp_path))
    assert said.count("\n") == 1


def test_train_without_a_recipe_says_where_they_are(capsys: pytest.CaptureFixture) -> None:
    for given in ([], ["--run.seed", "1"], ["--fresh"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *given])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "usage: sfgrpo train [-h] [--fresh] recipe" in said
        assert "a name that `sfgrpo recipes` lists" in said


def test_an_output_folder_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, (problem,) = examination.machine.disk(tmp_path / "file" / "run", 1)
    assert problem.fatal
    assert problem.what == f"run.output_dir: '{tmp_path}/file' is no folder"


def test_a_folder_for_pretraining_is_made_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        pretrain(tmp_path / "new", steps=-1)
    assert not (tmp_path / "new").exists()
