"""The tidy table, the summary and the figures of logs whose numbers are known."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfgrpo import cli
from sfgrpo.compare import figures, table
from sfgrpo.compare.grid import Grid
from sfgrpo.compare.summary import summarise
from tests.support.compare import leave, made_up, write_grid

COST = {"velocity": 10, "gradient": 4, "decoded": 1000, "scored": 1000}


def leave_all(grid: Grid, uniform: Sequence[float], stepwise: Sequence[float]) -> None:
    """Rewards from 0 that rise linearly to these, seed by seed; stepwise is half as fast."""
    for run in grid.runs:
        end = (uniform if run.variant == "uniform" else stepwise)[run.seed]
        seconds = [1.0 if run.variant == "uniform" else 2.0] * 4
        leave(run.folder, {0: 0.0, 2: end / 2, 4: end}, seconds=seconds, cost=COST, judge=1 - end)


def test_axes_are_cumulative(tmp_path: Path) -> None:
    """Without evaluation and checkpoints; a gradient is three evaluations."""
    grid = made_up(tmp_path, seeds=[0])
    leave(grid.runs[0].folder, {0: 0.1, 2: 0.2, 4: 0.3}, seconds=[1, 2, 3, 4], cost=COST)
    (run,) = table.measured(grid.runs)
    assert run.finished
    assert run.axes["iteration"].tolist() == [0, 2, 4]
    assert run.axes["seconds"].tolist() == [0, 3, 10]
    assert run.axes["velocity_evaluations"].tolist() == [0, 44, 88]
    assert run.metrics["reward"].tolist() == [0.1, 0.2, 0.3]


def test_an_iteration_without_its_timing_counts_like_the_median_one(tmp_path: Path) -> None:
    grid = made_up(tmp_path, seeds=[0])
    leave(grid.runs[0].folder, {0: 0.1, 2: 0.2, 4: 0.3}, seconds=[1, 2, 9, 4])
    log = grid.runs[0].folder / "timing.jsonl"
    log.write_text("".join(line for line in log.open() if '"iteration": 3,' not in line))
    (run,) = table.measured(grid.runs)
    assert run.axes["seconds"].tolist() == [0, 3, 9]


def test_no_timing_is_no_axis_and_not_zero_seconds(tmp_path: Path) -> None:
    grid = made_up(tmp_path, seeds=[0])
    leave(grid.runs[0].folder, {0: 0.1, 4: 0.2})
    leave(grid.runs[1].folder, {0: 0.1})
    run, begun = table.measured(grid.runs)
    assert "seconds" not in run.axes
    assert run.missing["seconds"] == f"'{grid.runs[0].folder}/timing.jsonl' has no line"
    assert begun.axes["seconds"].tolist() == [0]


def test_what_comes_after_the_grids_iterations_is_left_out(tmp_path: Path) -> None:
    grid = made_up(tmp_path, seeds=[0])
    leave(grid.runs[0].folder, {0: 0.1, 4: 0.2, 6: 0.3}, seconds=[1.0] * 6)
    (run,) = table.measured(grid.runs)
    assert (run.axes["iteration"].tolist(), run.finished) == ([0, 4], True)


def test_the_table_is_tidy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_grid(tmp_path)
    leave_all(made_up(tmp_path), [0.5, 0.6, 0.7], [0.6, 0.8, 1.0])
    assert cli.main(["compare", str(path), "--no-train"]) == 0
    with (tmp_path / "runs" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3 * 2  # runs, evaluations, metrics
    assert rows[-1] == {
        "variant": "stepwise", "seed": "2", "iteration": "4", "seconds": "8",
        "velocity_evaluations": "88", "metric": "judge", "value": "0.0",
    }  # fmt: skip
    for name in ("curves", "others", "reach"):
        assert Image.open(tmp_path / "runs" / f"{name}.png").size[0] > 800
    said = capsys.readouterr().out
    assert "0.800 [0.600, 1.000]; difference +0.200 [+0.100, +0.300], p 0.25 (3 pairs: at " in said
    assert "iterations to reward 0.600: 3.0 [2.4, 4.0], 3 of 3 runs; ratio 0.750 [0.700," in said


def test_a_run_that_lacks_an_axis_takes_it_from_the_figures_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, grid = write_grid(tmp_path), made_up(tmp_path)
    leave_all(grid, [0.5, 0.6, 0.7], [0.6, 0.8, 1.0])
    leave(grid.runs[3].folder, {0: 0.0, 4: 0.5}, seconds=[1.0] * 4)
    assert cli.main(["compare", str(path), "--no-train"]) == 0
    said = capsys.readouterr().out
    log = grid.runs[3].folder / "metrics.jsonl"
    assert f"no axis of velocity evaluations: '{log}' has no 'cost'\n" in said
    with (tmp_path / "runs" / "table.csv").open() as file:
        empty = {row["seed"] for row in csv.DictReader(file) if not row["velocity_evaluations"]}
    assert empty == {"1"}
    assert figures.shared_axes({"all": table.measured(grid.runs)}) == ["iteration", "seconds"]


def test_the_summary_of_known_curves(tmp_path: Path) -> None:
    grid = made_up(tmp_path)
    leave_all(grid, [0.5, 0.6, 0.7], [0.6, 0.8, 1.0])
    found = summarise(table.measured(grid.runs), reference="uniform", metric="reward", target=None)
    assert found["reach"] == pytest.approx(0.6)
    uniform, stepwise = (found["variants"][name] for name in ("uniform", "stepwise"))
    assert stepwise["end"]["reward"]["median"] == 0.8
    difference = stepwise["end"]["reward"]["difference"]
    assert difference == pytest.approx(
        {"median": 0.2, "low": 0.1, "high": 0.3, "pairs": 3, "p": 0.25}
    )
    assert stepwise["end"]["judge"]["difference"]["median"] == pytest.approx(-0.2)
    # Of 4 iterations: uniform never, 4, 4 * 6 / 7; stepwise 4, 3, 2.4.
    way = uniform["to_reach"]["iteration"]
    assert (way["reached"], way["of"], way["median"], way["high"]) == (2, 3, 4, None)
    assert way["low"] == pytest.approx(4 * 6 / 7)
    assert way["ratio"] is None
    way = stepwise["to_reach"]["iteration"]
    assert [way[k] for k in ("median", "low", "high")] == pytest.approx([3, 2.4, 4])
    # Pairs: 4 against never in 4, 3 against 4, 2.4 against 24 / 7.
    ratio = way["ratio"]
    assert [ratio[k] for k in ("median", "low", "high")] == pytest.approx([0.75, 0.7, 1])
    assert ratio["p"] == 0.5
    seconds = stepwise["to_reach"]["seconds"]["ratio"]
    assert seconds["median"] == pytest.approx(2 * 0.75)
    json.dumps(found, allow_nan=False)


def test_a_run_that_is_not_finished_has_no_end(tmp_path: Path) -> None:
    grid = made_up(tmp_path)
    leave_all(grid, [0.5, 0.6, 0.7], [0.6, 0.8, 1.0])
    leave(grid.runs[5].folder, {0: 0.0, 2: 0.5}, seconds=[2.0] * 2)  # stepwise-2
    measured = table.measured(grid.runs)
    found = summarise(measured, reference="uniform", metric="reward", target=None)
    stepwise = found["variants"]["stepwise"]
    assert (stepwise["seeds"], stepwise["finished"]) == ([0, 1, 2], [0, 1])
    assert stepwise["end"]["reward"]["median"] == pytest.approx(0.7)
    way = stepwise["to_reach"]["iteration"]
    assert (way["reached"], way["median"], way["high"]) == (2, 4, None)
    assert (way["ratio"]["pairs"], way["ratio"]["p"]) == (3, None)
    places, estimates, whole = figures.medians(
        [run for run in measured if run.variant == "stepwise"], "iteration", "reward"
    )
    assert (places, whole) == ([0, 2, 4], 2)
    assert estimates[1:] == [(0.4, 0.3, 0.5), (0.7, 0.6, 0.8)]


def test_runs_that_were_evaluated_at_other_iterations_make_one_line(tmp_path: Path) -> None:
    """Between its evaluations a run is on the straight line, in place and in value."""
    grid = made_up(tmp_path)
    runs = [run for run in grid.runs if run.variant == "stepwise"]
    leave(runs[0].folder, {0: 0.0, 2: 0.4, 4: 0.6}, seconds=[1.0] * 4)
    leave(runs[1].folder, {0: 0.0, 1: 0.3, 4: 0.6}, seconds=[3.0] * 4)
    leave(runs[2].folder, {0: 0.0, 4: 0.8}, seconds=[8.0] * 4)
    measured = table.measured(runs)
    places, estimates, whole = figures.medians(measured, "seconds", "reward")
    assert places == pytest.approx([0, 3, 6, 12])
    assert [middle for middle, _, _ in estimates] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert whole == 4


def test_a_reference_that_is_not_finished_is_no_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = made_up(tmp_path, reach=0.5)
    path = tmp_path / "grid.yaml"
    leave_all(grid, [0.5, 0.6, 0.7], [0.6, 0.8, 1.0])
    for run in grid.runs[::2]:  # uniform
        leave(run.folder, {0: 0.0, 2: 0.3}, seconds=[1.0] * 2, cost=COST)
    assert cli.main(["compare", str(path), "--no-train"]) == 0
    said = capsys.readouterr().out
    assert (
        "uniform: 0 of 3 runs finished\n  iterations to reward 0.500: never [never, never]" in said
    )
    found = json.loads((tmp_path / "runs" / "summary.json").read_text())["variants"]["stepwise"]
    assert found["end"]["reward"]["difference"] is None
    assert found["to_reach"]["iteration"]["ratio"] is None
    assert found["to_reach"]["iteration"]["reached"] == 3


def test_what_cannot_be_said_is_an_error(tmp_path: Path) -> None:
    grid = made_up(tmp_path)
    for run in grid.runs:
        leave(run.folder, {0: 0.0, 2: 0.5}, seconds=[1.0] * 2)
    measured = table.measured(grid.runs)
    with pytest.raises(ValueError, match=r"no evaluation has 'rewrd' \(known: reward\)"):
        summarise(measured, reference="uniform", metric="rewrd", target=None)
    with pytest.raises(ValueError, match="no run of the reference 'uniform' is finished"):
        summarise(measured, reference="uniform", metric="reward", target=None)
    found = summarise(measured, reference="uniform", metric="reward", target=0.25)
    assert found["variants"]["uniform"]["to_reach"]["iteration"]["median"] == 1


def test_two_that_are_there_from_the_start_are_alike(tmp_path: Path) -> None:
    grid = made_up(tmp_path)
    leave_all(grid, [0.5] * 3, [0.5] * 3)
    found = summarise(table.measured(grid.runs), reference="uniform", metric="reward", target=0.0)
    ratio = found["variants"]["stepwise"]["to_reach"]["seconds"]["ratio"]
    assert (ratio["median"], ratio["p"]) == (1, 1)


def test_never_is_drawn_with_an_arrow(tmp_path: Path) -> None:
    grid = made_up(tmp_path)
    leave_all(grid, [0.5, 0.6, 0.7], [0.1, 0.1, 0.1])
    groups = {
        name: [run for run in table.measured(grid.runs) if run.variant == name]
        for name in grid.variants
    }
    figure = figures.ways(groups, "reward", 0.6)
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert markers.count("x") == 1 + 3
    assert markers.count(">") == 2
    assert all(
        np.isfinite(np.asarray(line.get_xdata(), float)).all() for line in figure.axes[0].lines
    )
    assert math.isclose(figure.axes[0].get_xlim()[0], 0)
