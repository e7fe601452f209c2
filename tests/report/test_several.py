"""Reports of several runs, and the page that compares and links them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from sfgrpo import cli, report
from sfgrpo.report import several
from tests.support.made_run import make_run


def links(page: Path) -> list[Path]:
    """Where the links of a page lead that leave it."""
    found = re.findall(r'href="((?!data:|#)[^"]*)"', page.read_text())
    return [(page.parent / unquote(target)).resolve() for target in found]


def test_every_page_leads_to_every_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["a/first", "b/deep er/100%", "b/deep er/<3"]
    runs = [make_run(tmp_path / name, "stepwise", [0.25, 0.5]) for name in names]
    assert cli.main(["report", *map(str, runs)]) == 0
    together = tmp_path / "runs.html"
    pages = [run / "report.html" for run in runs]
    assert capsys.readouterr().out.splitlines()[-1] == f"runs: {together}"
    assert links(together) == [page.resolve() for page in pages]
    for page in pages:
        assert links(page) == [together, *(other for other in pages if other != page)]
    report.write(runs[0])  # alone again: no links are left that may lead nowhere
    assert links(pages[0]) == []


def test_the_page_shows_ends_curves_and_what_differs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "x" / "run", "stepwise", [0.25, 0.5, 0.75]),
        make_run(tmp_path / "y" / "run", "uniform", [0.25, 0.375]),
    ]
    (log := runs[1] / "eval.jsonl").write_text(log.read_text().replace("judge", "other"))
    report.write_several(runs)
    page = (tmp_path / "runs.html").read_text()
    assert re.findall(r">([xy]/run)</a>", page) == ["x/run", "y/run"]
    cells = re.findall(r'<td class="number">(.*?)</td>', page)
    assert cells == ["2", "4 seconds", "0.750", "1", "2 seconds", "0.375"]
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles == [
        "At the end",
        "Reward against iterations",
        "Reward against seconds of training",
    ]
    assert re.findall("<code>(.*?)</code>", page) == ["credit.rule"]
    assert not re.search(r"<script|@import|url\((?!#)", page)


def test_a_run_without_timing_is_drawn_over_iterations_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "uniform", [0.25, 0.5]) for name in "ab"]
    (runs[0] / "timing.jsonl").unlink()
    report.write_several(runs)
    page = (tmp_path / "runs.html").read_text()
    assert "Reward against seconds" not in page
    assert "What the recipes differ in" not in page


def test_seconds_leave_out_what_is_no_training(tmp_path: Path) -> None:
    rows = [
        {"iteration": k, "seconds": 10.0 * k, "phases": {"train": 1.0, "evaluate": 9.0 * k}}
        for k in (1, 2, 4)  # 3 was saved when the run was asked to stop
    ]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.array_equal(several._seconds(tmp_path, [0, 2, 4]), [0, 3, 9])


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "run", "uniform", [0.25, 0.5])
    assert cli.main(["report", str(run), str(tmp_path / "none")]) == 2
    assert "none' holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(run), str(run / ".." / "run")]) == 2
    assert "is given twice" in capsys.readouterr().err
    (other := make_run(tmp_path / "other", "uniform", [0.25, 0.5]) / "recipe.yaml").unlink()
    assert cli.main(["report", str(run), str(other.parent)]) == 2
    assert not (run / "report.html").exists()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["credit"]["rule"] == "uniform"
