"""What OCR reads in a run's images, before and after training, as a picture with marks.

Command: ``python -m benchmarks.trainer.readings runs/numbers --out readings.png``.

The same prompts and noise on both sides, the first image of each prompt. Below an image stands what
the recogniser reads in it: green if it is what was asked for, else red, after what was asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image

from sfgrpo import files, prompts
from sfgrpo.report import logs
from sfgrpo.report.plots import plt
from sfgrpo.rewards.ocr import Recogniser

RIGHT, WRONG = "#1a7f37", "#cf222e"
COLUMNS, ROWS = 4, 8
UNKNOWN = "\u25a1"
"""Stands for what Matplotlib's own font may lack: the recogniser knows 18,710 characters."""


def first_images(run: Path, iteration: int, count: int) -> np.ndarray:
    """The first image of each of `count` prompts, [count, H, W, 3] uint8."""
    resolution = yaml.safe_load(logs.recipe(run)[0])["model"]["resolution"]
    width = resolution if isinstance(resolution, int) else resolution[1]
    with Image.open(run / "images" / f"{iteration:06d}.png") as picture:
        grid = np.asarray(picture)[:, :width]
    return grid.reshape(count, -1, width, 3)


def panel(axes: Axes, images: np.ndarray, read: Sequence[str], asked: Sequence[str]) -> None:
    """Draw images [K, H, W, 3] in `COLUMNS` columns, framed and marked."""
    count, height, width, _ = images.shape
    step_y, step_x = height * 1.55, width * 1.12
    for index, (image, text, target) in enumerate(zip(images, read, asked, strict=True)):
        row, column = divmod(index, COLUMNS)
        left, top = column * step_x, row * step_y
        right = text == target
        axes.imshow(image, extent=(left, left + width, top + height, top), interpolation="nearest")
        shown = (
            "".join(c if c.isascii() and c.isprintable() else UNKNOWN for c in text) or "nothing"
        )
        axes.text(
            left + width / 2, top + height * 1.24,
            shown if right else f"{target}: {shown}",
            ha="center", va="center", fontsize=9, weight="bold", color=RIGHT if right else WRONG,
        )  # fmt: skip
    axes.set(xlim=(-2, COLUMNS * step_x), ylim=(-(-count // COLUMNS) * step_y, -3))
    axes.set_aspect("equal")
    axes.axis("off")


def draw(run: Path, out: Path, *, threads: int = 1) -> list[float]:
    """Write the picture; returns the shares read as asked, of all images that are shown.

    Raises:
        ValueError: `run` holds no run, or its prompts no "text".
    """
    log = logs.rows(run, "eval")
    ends = [log[0]["iteration"], log[-1]["iteration"]]
    source = yaml.safe_load(logs.recipe(run)[0])["prompts"]
    wanted = {prompt.text: prompt.metadata.get("text") for prompt in prompts.load(source)}
    lines = (run / "images" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    chosen = np.linspace(0, len(lines) - 1, min(len(lines), COLUMNS * ROWS)).round().astype(int)
    asked = [wanted.get(lines[index]) for index in chosen]
    if not all(isinstance(text, str) for text in asked):
        raise ValueError(f"'{run}': prompts of '{source}' without a text to be read")
    reader, shares = Recogniser(threads=threads, batch=64), []
    figure, pair = plt.subplots(1, 2, figsize=(11, 6), layout="tight")
    for axes, iteration in zip(pair, ends, strict=True):
        images = first_images(run, iteration, len(lines))[chosen]
        read = reader.read(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        right = sum(text == target for text, target in zip(read, asked, strict=True))
        shares.append(right / len(asked))
        panel(axes, images, read, [str(text) for text in asked])
        when = "before" if iteration == ends[0] else f"after {iteration} iterations"
        axes.set_title(f"{when}: {right} of {len(asked)} read as asked")
    with files.replacing(out) as aside:
        figure.savefig(aside, format="png", dpi=90)
    plt.close(figure)
    return shares


def main() -> int:
    """Draw one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("readings.png"))
    parsed = parser.parse_args()
    shares = draw(parsed.run, parsed.out)
    print(f"{parsed.out}: {shares[0]:.3f} before, {shares[1]:.3f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
