"""What a run shows: a report in one file, its numbers as text, comparisons as pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sfgrpo import cli, report
from sfgrpo.report import plots


def make_run(folder: Path, rule: str, rewards: list[float]) -> Path:
    (folder / "images").mkdir(parents=True)
    metrics = [
        {
            "iteration": k + 1, "reward": r, "kl": 0.1 * k, "clip_fraction": 0.0, "grad_norm": 1.0,
            "logp_drift_max": 1e-6, "reward_per_state": [0.1, r], "gain_per_step": [r],
        }
        for k, r in enumerate(rewards[1:])
    ]  # fmt: skip
    evals = [{"iteration": k, "reward": r, "judge": 1 - r} for k, r in enumerate(rewards)]
    for name, rows in {"metrics": metrics, "eval": evals}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases = {"rollout": 1.5, "communication": 0.0, "waiting": 0.25, "train": 0.5}
    timing = {
        "iteration": 1, "seconds": 2.25, "images_per_second": 4.0,
        "phases": phases, "share": {}, "slowest": {**phases, "waiting": 0.5},
    }  # fmt: skip
    (folder / "timing.jsonl").write_text(json.dumps(timing) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"credit": {"rule": rule}, "note": "<b>"}))
    for k in (0, len(rewards) - 1):
        Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(
            folder / "images" / f"{k:06d}.png"
        )
    (folder / "images" / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def test_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5, 0.875])
    shown = report.write(run)
    assert re.search(r"reward +0.250 +0.875", shown)
    assert re.search(r"judge +0.750 +0.125", shown)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    assert "&lt;b&gt;" in page
    assert "<b>0.875</b>" in page


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_compare_groups_runs_by_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [
        make_run(tmp_path / "a", "stepwise", [0.2, 0.5, 0.9]),
        make_run(tmp_path / "b", "stepwise", [0.2, 0.6, 0.8]),
        make_run(tmp_path / "c", "uniform", [0.2, 0.3, 0.4]),
    ]
    out = tmp_path / "figures" / "curves.png"
    assert cli.main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 800
    with pytest.raises(ValueError, match=r"no evaluation of 'rewrd' .*judge, reward"):
        plots.compare(runs, out, metric="rewrd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "embeded"], "did you mean 'embedded'"),
        (["train", "embedded", "--train.learning_rat", "1"], "did you mean 'learning_rate'"),
        (["train", "embedded", "--lora"], "--lora needs a value"),
        (["train", "embedded", "lora"], "expected --key value, got 'lora'"),
    ],
)
def test_wrong_commands_say_what_is_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_show_prints_every_key(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["show", "embedded", "--run.seed", "7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["seed"] == 7
    assert shown["credit"]["stride"] == 1
    assert cli.main(["recipes"]) == 0
    assert "embedded" in capsys.readouterr().out.split()
