"""A checkpoint's policy, measured again: as the run measured it, and in another way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfgrpo import cli, config, saved
from sfgrpo.run import records
from sfgrpo.run.checkpoints import Checkpoints, State
from sfgrpo.trainer import Trainer

LORA = {"full": "null", "lora": "{rank: 4, alpha: 12}"}
SHOWN = {"full": "null", "lora": "[16, 32]"}


@pytest.fixture(scope="module", params=["full", "lora"])
def run(recipe: Any, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """A finished run of two iterations, of which the best weights are kept, too."""
    folder = tmp_path_factory.mktemp(request.param)
    Trainer(
        recipe(
            folder, run__iterations="2", lora=LORA[request.param], train__learning_rate="1e-2",
            checkpoint="{every: 1, keep_best: true}", train__ema_decay="0.5",
            eval__resolution=SHOWN[request.param],
        )
    ).train()  # fmt: skip
    return folder


def numbers(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main(["evaluate", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_checkpoint_is_what_the_run_measured(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = {row["iteration"]: row for row in records.read(run / "eval.jsonl")}
    assert logged[0]["reward"] != logged[1]["reward"] != logged[2]["reward"]
    best = max(logged.values(), key=lambda row: row["reward"])
    for which, expected in (
        ("newest", logged[2]), ("1", logged[1]), ("start", logged[0]), ("best", best),
    ):  # fmt: skip
        found = numbers(run, capsys, "--checkpoint", which)
        assert found.keys() == expected.keys() - {"alarms"}  # those are about a whole run
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)
    kept = records.read(run / "evaluations" / "as_trained" / "eval.jsonl")
    assert [row["iteration"] for row in kept] == [0, 1, 2]
    pixels = [
        np.asarray(Image.open(folder / "images" / "000002.png")).astype(int)
        for folder in (run, run / "evaluations" / "as_trained")
    ]
    assert abs(pixels[0] - pixels[1]).max() <= 1  # adapters are saved times alpha / rank: rounding


def test_evaluation_of_another_size_leaves_training_as_it_is(run: Path) -> None:
    shown = config.load(str(run / "recipe.yaml")).eval_size[:2]
    assert shown == ((16, 32) if run.name.startswith("lora") else (32, 32))
    height, width = (2 * side for side in shown)  # two images of each of two prompts
    assert Image.open(run / "images" / "000000.png").size == (width, height)
    strip = Image.open(next((run / "strips").glob("*.png")))
    assert strip.size == (96, 64)  # three estimates of 32 x 32 of two trajectories


def test_more_steps_another_size_and_a_table(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(path for path in run.rglob("*") if "evaluations" not in path.parts)
    keys = ["--eval.num_steps", "7", "--eval.resolution", "16"]
    assert cli.main(["evaluate", str(run), *keys, "--out", str(tmp_path / "there")]) == 0
    printed = capsys.readouterr().out
    logged = records.read(run / "eval.jsonl")[-1]["reward"]
    (row,) = records.read(tmp_path / "there" / "eval.jsonl")
    assert row["changed"] == {"eval.num_steps": "7", "eval.resolution": "16"}
    assert f"reward{logged:31.4f}{row['reward']:13.4f}".split() in [
        line.split() for line in printed.splitlines()
    ]
    assert row["reward"] != pytest.approx(logged, rel=1e-6)
    assert before == sorted(path for path in run.rglob("*") if "evaluations" not in path.parts)
    numbers(run, capsys, "--eval.num_steps", "3")
    assert (run / "evaluations" / "eval.num_steps=3" / "eval.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "7"], r"--checkpoint 7: '.*' has start, 1, 2, best"),
        (["--train.beta", "0"], r"--train.beta: says nothing about how a finished policy"),
        (["--model.path", "embedded"], r"--model.path: says nothing"),
        (["--eval.every", "3"], r"--eval.every: says nothing"),
        (["--eval.num_step", "3"], r"eval.num_step\b.*num_steps"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["evaluate", str(run), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sfgrpo evaluate: ")
    assert re.search(message, said), said


@pytest.mark.parametrize("run", ["lora"], indirect=True)  # the other shows what it trains on
def test_a_size_that_would_change_nothing_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(run), "--model.resolution", "64"]) == 2
    said = capsys.readouterr().err
    assert "--model.resolution: changes nothing, since evaluation has eval.resolution;" in said


def test_where_nothing_can_be_written_nothing_is_sampled(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved.standing, "prepare", pytest.fail)
    (tmp_path / "file").touch()
    assert cli.main(["evaluate", str(run), "--out", f"{tmp_path}/file"]) == 2
    assert f"File exists: '{tmp_path}/file'" in capsys.readouterr().err


def test_a_damaged_checkpoint_and_no_run(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "holds no run: there is no recipe.yaml" in capsys.readouterr().err
    file = next((run / "checkpoints" / "000001" / "model").rglob("*.safetensors"))
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        assert cli.main(["evaluate", str(run), "--checkpoint", "1"]) == 2
        assert "000001' is damaged: model/" in capsys.readouterr().err
    finally:
        file.write_bytes(whole)


class Taking:
    """A backbone that notes what it is given, while the run goes on."""

    def __init__(self, *meanwhile: Callable[[], object]) -> None:
        self.meanwhile, self.given = list(meanwhile), list[str]()

    def restore(self, folder: Path) -> None:
        if self.meanwhile:
            self.meanwhile.pop()()
        if not folder.is_dir():
            raise OSError("gone")
        self.given.append(folder.parent.name)


@pytest.fixture
def going(tmp_path: Path) -> Callable[[int], None]:
    """A run that keeps one checkpoint, and the best; saves the one of an iteration."""
    kept = Checkpoints(tmp_path / "checkpoints", keep=1)

    def write(folder: Path) -> None:
        (folder / "model").mkdir()

    def save(iteration: int) -> None:
        state = State(iteration=iteration, best_iteration=iteration, best_reward=iteration)
        kept.save(state, write, lambda: None)
        kept.save_best(state, write, lambda: None)

    save(1)
    return save


@pytest.mark.parametrize("which", ["newest", "best"])
def test_what_a_run_replaces_meanwhile_is_chosen_anew(
    tmp_path: Path, going: Callable[[int], None], which: str
) -> None:
    before, taking = saved.chosen(tmp_path, which), Taking()
    going(2)  # while the network was loaded
    assert before.restore(taking) == 2  # pyright: ignore[reportArgumentType]
    assert taking.given == [{"newest": "000002", "best": "best"}[which]]
    late: Any = Taking(lambda: going(3))
    with pytest.raises(ValueError, match=r"has removed '.*' while it was read; ask again"):
        saved.chosen(tmp_path, which).restore(late)


def test_an_iteration_that_a_run_removes_meanwhile_is_missed(
    tmp_path: Path, going: Callable[[int], None]
) -> None:
    before, taking = saved.chosen(tmp_path, "1"), Taking()
    going(2)
    with pytest.raises(ValueError, match=r"--checkpoint 1: '.*' has start, 2, best"):
        before.restore(taking)  # pyright: ignore[reportArgumentType]


def test_a_run_that_starts_over_removes_them(recipe: Any, tmp_path: Path) -> None:
    given: config.Recipe = recipe(tmp_path)
    records.prepare(tmp_path, given, fresh=False)
    for name in ("as_trained", "eval.num_steps=3", "mine"):
        (tmp_path / "evaluations" / name).mkdir(parents=True)
    records.prepare(tmp_path, given, fresh=True)
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["mine"]


def test_a_checkpoint_is_probed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def probed(which: str) -> dict[str, Any]:
        small = ["--prompts", "1", "--sample.num_steps", "3", "--out", str(tmp_path), "--json"]
        assert cli.main(["probe", str(run), *small, "--checkpoint", which]) == 0
        return json.loads(capsys.readouterr().out)

    start, trained = probed("start"), probed("newest")
    assert (start["iteration"], trained["iteration"]) == (0, 2)
    assert start["reward"] != trained["reward"]
    assert cli.main(["probe", str(run), "--checkpoint", "7"]) == 2
    assert "--checkpoint 7" in capsys.readouterr().err
