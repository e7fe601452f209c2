"""What a run leaves behind on disk, and how it comes back after a crash.

metrics.jsonl   one line per iteration: numbers that depend on the recipe alone, so a resumed
                run writes the same bytes as one that was never stopped
eval.jsonl      one line per evaluation
timing.jsonl    seconds and share of each phase of an iteration (these do differ between runs)
recipe.yaml     the validated recipe
checkpoints/    see `sfgrpo.run.checkpoints`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sfgrpo import files

if TYPE_CHECKING:  # reading a run takes no PyTorch
    from sfgrpo.config import Recipe

LOGS = ("metrics.jsonl", "eval.jsonl", "timing.jsonl")
SAMPLES = ("images", "samples", "videos")
"""Folders of what is kept of evaluations."""
FREE = {
    "run.iterations", "run.output_dir", "run.peer_timeout",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "train.on_nonfinite", "train.drift_budget",
}  # fmt: skip
"""Keys that a run may change when it continues: how long, where, and what stops it."""


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says what to do."""


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def prepare(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make `folder` ready for this recipe: new, or the same recipe's earlier run.

    `fresh` removes an earlier run's files (only what this package wrote).

    Raises:
        RunError: the folder holds the run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if fresh:
        # The recipe goes last: stopped in between, what is left is still that recipe's.
        for name in ("checkpoints", "tensorboard", "model", *SAMPLES):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (*LOGS, "report.html", "failure.txt", "recipe.yaml"):
            (folder / name).unlink(missing_ok=True)
    if described.exists():
        changed = _differences(yaml.safe_load(described.read_text()), yaml.safe_load(text))
        if changed:
            raise RunError(
                f"'{folder}' holds a run of another recipe ({', '.join(changed)}); "
                "choose another --run.output_dir, or start over with --fresh"
            )
    for place in (folder, *(folder / name for name in SAMPLES)):
        files.clean(place)
    if not described.exists():
        files.write(described, text)


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Keys that differ, except those in `FREE`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            d for k in keys for d in _differences(old.get(k), new.get(k), f"{place}.{k}".strip("."))
        ]
    return [] if old == new or place in FREE else [f"{place}: {old!r} there, {new!r} here"]
