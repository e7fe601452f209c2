"""Grids and logs of runs that never were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sfgrpo.compare import grid
from sfgrpo.compare.grid import Grid


def write_grid(folder: Path, **changes: Any) -> Path:
    """A grid of two variants and three seeds, each run of four iterations."""
    data = {
        "recipe": "embedded",
        "seeds": [0, 1, 2],
        "base": {"run.iterations": 4, "eval.every": 2},
        "variants": {"uniform": {"credit.rule": "uniform"}, "stepwise": {}},
        "output_dir": str(folder / "runs"),
        **changes,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def made_up(folder: Path, **changes: Any) -> Grid:
    return grid.read(write_grid(folder, **changes))


def write_log(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def leave(
    folder: Path,
    rewards: Mapping[int, float],
    *,
    seconds: Sequence[float] = (),
    cost: Mapping[str, int] | None = None,
    **judges: float,
) -> None:
    """What a run leaves: evaluations (iteration -> reward), and for each iteration its seconds
    beside 100 of evaluation and 10 of a checkpoint."""
    write_log(
        folder / "eval.jsonl",
        [{"iteration": k, "reward": value, **judges} for k, value in rewards.items()],
    )
    metrics = {"reward": 0.5, **({"cost": cost} if cost else {})}
    iterations = range(1, max(rewards) + 1)
    write_log(folder / "metrics.jsonl", [{"iteration": k, **metrics} for k in iterations])
    timing = [
        {
            "iteration": k,
            "seconds": spent + 110,
            "phases": {"rollout": spent, "evaluate": 100, "checkpoint": 10},
        }
        for k, spent in enumerate(seconds, 1)
    ]
    write_log(folder / "timing.jsonl", timing)
