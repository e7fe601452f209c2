"""Runs of a grid: some at a time, stopped, killed and continued."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfgrpo import cli
from sfgrpo.compare import command, runs
from sfgrpo.compare.grid import Grid
from sfgrpo.run import records
from tests.support import reaching
from tests.support.compare import made_up, write_grid

COMPARE = "import sys; from tests.compare.test_runs import compare; compare(sys.argv[1])"


def fake(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.fake_run", str(recipe)]


def compare(path: str) -> None:
    from sfgrpo.compare import grid

    runs.train(grid.read(Path(path)), fake)


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runs, "POLL", 0.02)


def iterations(grid: Grid) -> list[list[int]]:
    return [
        [row["iteration"] for row in records.read(run.folder / "metrics.jsonl")]
        for run in grid.runs
    ]


def log(grid: Grid, name: str) -> str:
    return (grid.output_dir / f"{name}.log").read_text()


def test_every_run_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    grid = made_up(tmp_path, at_once=2, seeds=[0, 1])
    assert runs.train(grid, fake) == {}
    assert iterations(grid) == [[1, 2, 3, 4]] * 4
    assert all(map(runs.finished, grid.runs))
    assert log(grid, "uniform-0") == "from 0 with 3 threads\n"
    assert runs.train(grid, fake) == {}
    assert log(grid, "uniform-0") == "from 0 with 3 threads\n"  # nothing was started
    shutil.rmtree(grid.runs[0].folder)
    assert runs.train(grid, fake) == {}
    assert log(grid, "uniform-0") == "from 0 with 3 threads\n" * 2  # alone, but with its share


@pytest.mark.parametrize("metric", ["reward", "rewrd"])
def test_a_metric_that_is_not_there_is_said_while_runs_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    grid = made_up(tmp_path, seeds=[0], metric=metric)
    assert runs.train(grid, fake) == {}
    told = "unknown metric 'rewrd'; did you mean 'reward'?"
    assert capsys.readouterr().err.count(told) == (metric == "rewrd")


def test_so_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    collect = runs._Pool.collect

    def watched(pool: Any, *, failing: bool) -> None:
        most.append(len(pool.going))
        collect(pool, failing=failing)

    monkeypatch.setattr(runs._Pool, "collect", watched)
    monkeypatch.setenv("PACE", "0.1")
    assert runs.train(made_up(tmp_path, at_once=3, seeds=[0, 1]), fake) == {}
    assert max(most) == 3


def test_a_run_that_fails_is_named_and_others_go_on(tmp_path: Path) -> None:
    grid = made_up(tmp_path, seeds=[13, 1])
    failed = runs.train(grid, fake)
    why = f"ended with status 1 (of bad luck); see '{grid.output_dir}/uniform-13.log'"
    assert failed == {"uniform-13": why}
    assert iterations(grid) == [[], *[[1, 2, 3, 4]] * 3]


def test_a_comparison_that_is_asked_to_stop_stops_its_runs_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACE", "0.1")
    grid = made_up(tmp_path, base={"run.iterations": 20}, seeds=[0])

    def stop() -> None:
        while not runs.iterations(grid.runs[0]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    former = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with pytest.raises(runs.Stopped, match="SIGTERM") as stopped:
        runs.train(grid, fake)
    assert stopped.value.status == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is former
    done, none = iterations(grid)
    assert 0 < len(done) < 20
    assert none == []
    assert records.newest(grid.runs[0].folder) == len(done)
    monkeypatch.setenv("PACE", "0")
    assert runs.train(grid, fake) == {}
    assert iterations(grid) == [list(range(1, 21))] * 2
    assert f"from {len(done)} with" in log(grid, "uniform-0")


def test_what_a_killed_comparison_left_running_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACE", "0.1")
    path = write_grid(tmp_path, base={"run.iterations": 20}, seeds=[0])
    grid = made_up(tmp_path, base={"run.iterations": 20}, seeds=[0])
    process = subprocess.Popen([sys.executable, "-c", COMPARE, str(path)])
    while not runs.iterations(grid.runs[0]):
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"output_dir '.*' is in use by process {process.pid}"):
        runs.train(grid, fake)
    process.kill()
    process.wait()
    monkeypatch.setenv("PACE", "0")
    assert runs.train(grid, fake) == {}
    assert iterations(grid) == [list(range(1, 21))] * 2
    assert log(grid, "uniform-0").count("from") == 1


def test_a_folder_of_another_recipe_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = made_up(tmp_path, seeds=[0])
    runs.train(grid, fake)
    capsys.readouterr()
    path = write_grid(tmp_path, seeds=[1, 0], base={"run.iterations": 6, "sample.eta": 0.5})
    assert cli.main(["compare", str(path)]) == 2
    said = capsys.readouterr().err
    assert "uniform-0' holds a run of another recipe (" in said
    assert "sample.eta: 0.7 there, 0.5 here); choose another output_dir, or remove" in said
    assert said.count("\n") == 1
    assert not (grid.output_dir / "uniform-1").exists()


def test_longer_runs_continue_those_that_are_there(tmp_path: Path) -> None:
    runs.train(made_up(tmp_path, seeds=[0]), fake)
    longer = made_up(tmp_path, seeds=[0], base={"run.iterations": 6, "eval.every": 2})
    runs.train(longer, fake)
    assert iterations(longer) == [[1, 2, 3, 4, 5, 6]] * 2
    assert "from 4 with" in log(longer, "stepwise-0")


@pytest.mark.slow
def test_a_tiny_grid_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = reaching.keys(tmp_path, lora="null", eval__every="1")
    del given["run"]
    keys = {key: yaml.safe_load(value) for key, value in given.items()} | {"run.iterations": 1}
    path = write_grid(tmp_path, seeds=[3], base=keys, variants={"stepwise": {}})
    assert cli.main(["compare", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"'{tmp_path}/runs': 0 of 1 runs are finished" in said
    assert "seconds to reward" in said
    assert (tmp_path / "runs" / "stepwise-3" / "report.html").is_file()
    lines = (tmp_path / "runs" / "table.csv").read_text().splitlines()
    assert sum(line.startswith("stepwise,3,1,") for line in lines) == 3  # reward, its part, spread


def test_options_of_every_variant_are_checked_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the variants before it have run through the night."""
    trained = []
    monkeypatch.setattr(runs, "train", trained.append)
    for keys, told in (
        ({"credit.solver": "euler", "credit.solver_options": {"substep": 5}}, "substeps"),
        ({"sample.sampler_options": {"power": 2}}, "power"),
        ({"credit.options": {"horizon": 2}}, "horizon"),
    ):
        path = write_grid(tmp_path, variants={"first": {}, "second": keys})
        with pytest.raises(ValueError, match=f"variants.second: .*{told}"):
            command.main(path)
    assert not trained
