"""The picture of what OCR reads in a run's images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from benchmarks.trainer import readings
from sfgrpo.embedded import data
from sfgrpo.embedded.task import NUMBER


def write_run(folder: Path, ends: dict[int, Tensor], asked: list[data.PromptRecord]) -> Path:
    """A run whose picture at each iteration has images [P, 3, H, W], a prompt below the other."""
    (folder / "images").mkdir(parents=True)
    for iteration, images in ends.items():
        grid = (images.permute(0, 2, 3, 1).flatten(0, 1) * 255).round().byte().numpy()
        Image.fromarray(grid).save(folder / "images" / f"{iteration:06d}.png")
    lines = [json.dumps({"iteration": iteration, "reward": 0.0}) + "\n" for iteration in ends]
    (folder / "eval.jsonl").write_text("".join(lines))
    (folder / "images" / "prompts.txt").write_text("".join(f"{e['prompt']}\n" for e in asked))
    (folder / "prompts.jsonl").write_text(data.as_jsonl(asked))
    recipe = {
        "credit": {"rule": "stepwise"},
        "prompts": str(folder / "prompts.jsonl"),
        "model": {"resolution": [32, 64]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_it_counts_what_is_read_as_asked(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real = data.sample(8, split=data.JUDGE_DIGITS, generator=generator, task=NUMBER)
    flat = torch.full_like(real.images, 0.5)
    run = write_run(tmp_path / "run", {0: flat, 60: real.images}, real.records)
    found = readings.draw(run, tmp_path / "out.png")
    assert found[0] == 0
    assert found[1] > 0.5
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 800
    half = [*real.records[:4], *({**e, "text": "9999"} for e in real.records[4:])]
    (run / "prompts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in half))
    assert readings.draw(run, tmp_path / "out.png")[1] <= 0.5


def test_it_says_that_there_is_no_text_to_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real = data.sample(2, split=data.JUDGE_DIGITS, generator=generator, task=NUMBER)
    run = write_run(tmp_path / "run", {0: real.images}, real.records)
    (run / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "{e["prompt"]}"}}\n' for e in real.records)
    )
    with pytest.raises(ValueError, match="without a text to be read"):
        readings.draw(run, tmp_path / "out.png")
