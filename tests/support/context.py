"""Runs whose ranks share sequences, or do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfgrpo import engine
from sfgrpo.config import Recipe
from sfgrpo.doctor import footprint
from sfgrpo.run import records
from sfgrpo.trainer import Trainer
from tests.support.rewards import Redness


def work(recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What each run comes to on this rank, and two rows that every rank has values of."""
    found = {name: run(recipe) for name, recipe in recipes.items()}
    mine = torch.tensor([1.0, 0.0]) + 10 * engine.rank()
    return {**found, "rows": engine.gather(mine, torch.tensor([1, 0])).tolist()}


def run(recipe: Recipe) -> dict[str, Any]:
    """The trained parameters, the metrics, what was evaluated, how often the reward was asked, and
    the most bytes of a micro-batch, without the engine: where it shards weights, 0."""
    before, trainer = Redness.calls, Trainer(recipe)
    trainer.train()
    asked, folder = Redness.calls - before, Path(trainer.progress.folder)
    return {
        "parameters": trainer.engine.masters.whole(),
        "metrics": records.read(folder / "metrics.jsonl")[-1],
        "evaluated": records.read(folder / "eval_prompts.jsonl")[-1],
        "asked": asked,
        "peak": 0 if trainer.engine.shards_parameters else _peak(recipe, trainer),
    }


def _peak(recipe: Recipe, trainer: Trainer) -> int:
    backbone: Any = trainer.backbone
    kept = [part for layer in trainer.policy.network.modules() for part in vars(layer).values()]
    with footprint.Ledger() as ledger:
        ledger.add_all(trainer.policy.network)
        for part in kept:
            if isinstance(part, torch.Tensor):  # Qwen-Image's rotary table is no buffer
                ledger.add(part)
        return footprint._backward(recipe, backbone, ledger, recipe.train.micro_batch_size)[0]
