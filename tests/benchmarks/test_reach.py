"""The flow policy that reaches: its reward by hand, its teacher, and its recipe from end to end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.claims import reach
from sfgrpo import cli, config
from sfgrpo.run import records

STRAIGHT = torch.zeros(1, reach.MOVES, 2)
STRAIGHT[..., 0] = 1 / (reach.UNIT * reach.MOVES)  # to (1, 0)


def test_reward_by_hand() -> None:
    def reward(*scene: float) -> float:
        return float(reach.Reached()(STRAIGHT, [json.dumps(scene)], [{}]))

    assert reward(1, 0, 0.5, 3, 0.1) == pytest.approx(1, abs=1e-5)
    assert reward(1.1, 0, 0.5, 3, 0.1) == pytest.approx(0.3679, abs=1e-3)  # e^-1: missed by 0.1
    assert reward(1, 0, 0.5, 0.1, 0.1) == pytest.approx(0.5, abs=1e-3)  # at the very edge
    assert reward(1, 0, 0.5, 0, 0.2) < 1e-3


def test_the_teacher_arrives_and_is_careless() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = reach.scenes(2000, generator)
    moves = reach.demonstrations(scenes, generator)
    assert float((reach.paths(moves)[:, -1] - scenes[:, :2]).norm(dim=-1).mean()) < 0.03
    hits = (reach.clearance(moves, scenes) < 0).float().mean()
    assert 0.3 < float(hits) < 0.5
    assert 0.5 < float(moves.std()) < 1


def test_its_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration of a policy that was shown little."""
    recipe = Path(reach.__file__).with_name("recipes") / "reach.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reach, "cloned", partial(reach.cloned, steps=1))
    reach.main()
    assert config.load(str(recipe)).credit.solver == "euler"
    short = ["--run.iterations", "1", "--eval.prompts", "2", "--sample.prompts_per_iteration", "2"]
    assert cli.main(["train", str(recipe), *short]) == 0
    assert {"reward", "spread"} < records.read(tmp_path / "runs/reach/run/eval.jsonl")[-1].keys()
