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
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sfgrpo.config import Recipe
from sfgrpo.evaluate import Evaluation
from sfgrpo.run.checkpoints import sync_folder

FRAME_RATE = 16
"""Frames a second of the videos that are kept; Wan's."""
LOGS = ("metrics.jsonl", "eval.jsonl", "timing.jsonl")
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a complete new one, or leave the old."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Logs:
    """Appends to a run's logs and mirrors numbers to TensorBoard."""

    def __init__(self, folder: Path, start: int | None) -> None:
        """Continue the logs of `folder` after iteration `start`, dropping what came later; None
        drops everything."""
        self.folder, last = folder, -1 if start is None else start
        for name in LOGS:
            kept = [row for row in read(folder / name) if row["iteration"] <= last]
            write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, log: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Append one line to `<log>.jsonl`."""
        with (self.folder / f"{log}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        for name, value in values.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                if isinstance(number, int | float):
                    self.board.add_scalar(f"{log}/{name}/{part}".strip("/"), number, iteration)

    def sync(self) -> None:
        """Have every line on the disk: a checkpoint counts on those before it."""
        for name in LOGS:
            if (self.folder / name).exists():
                sync_folder(self.folder / name)

    def close(self) -> None:
        self.board.close()


def save_videos(folder: Path, iteration: int, videos: Tensor) -> None:
    """Keep videos [K, F, 3, H, W] as `videos/<iteration>-<k>.webp`, which browsers play."""
    place = folder / "videos"
    place.mkdir(exist_ok=True)
    for k, video in enumerate(rearrange(videos, "k f c h w -> k f h w c").numpy()):
        first, *rest = map(Image.fromarray, video)
        first.save(
            place / f"{iteration:06d}-{k}.webp", save_all=True, append_images=rest,
            duration=1000 // FRAME_RATE, loop=0,
        )  # fmt: skip


def save_samples(folder: Path, iteration: int, evaluation: Evaluation) -> None:
    """Keep an evaluation's images as `images/<iteration>.png`, a row per line of `prompts.txt`;
    what is no image as `samples/<iteration>.safetensors`."""
    samples_PN = evaluation.samples_PN
    pictures = samples_PN.dtype == torch.uint8
    path = folder / ("images" if pictures else "samples") / f"{iteration:06d}"
    path.parent.mkdir(exist_ok=True)
    if pictures:
        grid = rearrange(samples_PN, "p n c h w -> (p h) (n w) c")
        Image.fromarray(grid.numpy()).save(path.with_suffix(".png"))
    else:
        save_file({"samples": samples_PN.contiguous()}, path.with_suffix(".safetensors"))
    if evaluation.videos is not None:
        save_videos(folder, iteration, evaluation.videos)
    lines = "".join(" ".join(prompt.text.split()) + "\n" for prompt in evaluation.prompts)
    write_atomically(path.parent / "prompts.txt", lines)


def prepare(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make `folder` ready for this recipe: new, or the same recipe's earlier run.

    `fresh` removes an earlier run's files (only what this module and the report wrote).

    Raises:
        RunError: the folder holds the run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if fresh:
        # The recipe goes last: stopped in between, what is left is still that recipe's.
        for name in ("checkpoints", "tensorboard", "images", "samples", "videos", "model"):
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
    else:
        write_atomically(described, text)


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Keys that differ, except those in `FREE`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            d for k in keys for d in _differences(old.get(k), new.get(k), f"{place}.{k}".strip("."))
        ]
    return [] if old == new or place in FREE else [f"{place}: {old!r} there, {new!r} here"]
