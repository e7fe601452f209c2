"""Grid files: what they mean, and what is wrong with one in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfgrpo import cli
from sfgrpo.compare import EXAMPLE, grid
from sfgrpo.compare.grid import Grid
from tests.support.compare import made_up, write_grid


def test_runs_are_variants_by_seeds(tmp_path: Path) -> None:
    asked = made_up(
        tmp_path,
        variants={
            "uniform": {"credit.rule": "uniform", "eval.every": 3},
            "medium": {"recipe": "sd35_medium", "lora": None},
        },
    )
    assert [run.name for run in asked.runs] == [
        f"{name}-{seed}" for seed in range(3) for name in ("uniform", "medium")
    ]
    first, second = asked.runs[:2]
    assert first.folder == tmp_path / "runs" / "uniform-0"
    assert (first.recipe.credit.rule, first.recipe.eval.every, first.iterations) == (
        "uniform",
        3,
        4,
    )
    assert (second.recipe.model.resolution, second.recipe.lora) == (512, None)
    assert [run.recipe.run.seed for run in asked.runs] == [0, 0, 1, 1, 2, 2]
    assert asked.compared == "uniform"


def test_the_example_has_every_key(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(EXAMPLE)
    assert len(grid.read(path).runs) == 10
    assert all(f"    {key}: " in EXAMPLE or f"    {key}:\n" in EXAMPLE for key in Grid.model_fields)


def test_the_claims_of_the_benchmarks_can_be_run() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "claims"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for path in files:
        assert len(grid.read(path).seeds) >= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "the grid cannot be run: seed: unknown key 'seed'; did you mean 'seeds'?"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [0, 0]}, "seeds: a seed stands there twice"),
        ({"seeds": [True]}, "seeds: Input should be a valid integer"),
        ({"seeds": list(range(21))}, "seeds: Tuple should have at most 20 items"),
        ({"at_once": 0}, "at_once: Input should be greater than or equal to 1 (got 0)"),
        ({"reach": "0.5"}, "reach: expected a number, without quotes"),
        ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
        ({"variants": {"../up": {}}}, "variants: '../up' names a folder"),
        ({"variants": {"a": {"run.seed": 1}}}, "variants: a: run.seed: stands in seeds"),
        ({"base": {"run.output_dir": "x"}}, "base: run.output_dir: follows from output_dir"),
        ({"base": {"run": {}}}, "base: run: give its keys one by one"),
        ({"reference": "unifrm"}, "reference: unknown variant 'unifrm'; did you mean 'uniform'?"),
        (
            {"variants": {"a": {"credit.rul": "uniform"}}},
            "variants.a: the recipe cannot be run: credit.rul: unknown key 'rul'; did you mean",
        ),
        ({"variants": {"a": {"recipe": 3}}}, "variants.a: recipe: expected text, got 3"),
        ({"variants": {"a": {"recipe": "embeded"}}}, "variants.a: unknown recipe 'embeded'"),
        ({"variants": {"a": {"train.beta.x": 3}}}, "variants.a: train.beta.x: 'beta' is not a sec"),
        ({"recipe": "nowhere.yaml"}, "recipe file 'nowhere.yaml' does not exist"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_grid(tmp_path, **changes)
    assert cli.main(["compare", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sfgrpo compare: '{path}': ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "grid 'nowhere.yaml' cannot be read: No such file"),
        (["{0}", "{0}"], "is a grid; give it alone"),
        (["{0}", "--out", "x.png"], "--out, --metric: a grid has the keys output_dir and metric"),
        (["{0}", "--no-train"], "has an evaluation yet"),
        (["runs/a", "--no-train"], "--no-train: folders are never trained"),
    ],
)
def test_grids_and_folders_are_told_apart(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_grid(tmp_path)
    assert cli.main(["compare", *(word.format(path) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
