"""Whole runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sfgrpo.config import Recipe
from tests.support import ranks


def command_line(recipe: Recipe, folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """`launcher sfgrpo.train recipe.yaml`, the recipe written to `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(
        [*launcher, "sfgrpo.train", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def on_ranks(recipe: Recipe, world: int) -> None:
    """Train on several ranks; DeepSpeed's launcher, which takes as long to start as a rank, is left
    to the one test that is about it (tests/doctor)."""
    ranks.run("tests.support.training:train", world, recipe)


def train(recipe: Recipe) -> None:
    """What each rank runs."""
    from sfgrpo.trainer import Trainer

    Trainer(recipe).train()
