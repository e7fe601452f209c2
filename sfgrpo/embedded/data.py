"""Captioned images made from scikit-learn's 1,797 handwritten digits.

Every image is a line of real digits (8 x 8, 17 grey levels, UCI "Optical Recognition of
Handwritten Digits", in the scikit-learn wheel), enlarged and recoloured: digits and colours of a
caption combine freely. How many digits, and how large, a `Task` says.

The digits are split by index, once and for all: even a judge that is fitted while a run is under
way never sees a digit the generator was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from sfgrpo.embedded.task import DIGIT, Task
from sfgrpo.rewards.colour import COLOURS, colour

PRETRAINING_DIGITS = slice(0, 1197)
JUDGE_DIGITS = slice(1197, 1797)

STRIDE = 7
"""From one text's pairs of colours to the next's; prime to their number, so that all come up."""

MIN_CONTRAST = 3.0
"""Least WCAG 2 contrast ratio between digit and background; below it even a human guesses."""


class PromptRecord(TypedDict):
    """One line of `prompts.jsonl`: the caption, and what the rewards need to know about it."""

    prompt: str
    text: str
    foreground: str
    background: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images with the attributes they were drawn from."""

    images: Tensor
    """[B, 3, H, W] float32 in [0, 1]."""
    labels: Tensor
    """[B L] int64, the L digits of each image, one image after the other."""
    records: list[PromptRecord]
    """[B] captions and attributes."""


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two colour words, in [1, 21]."""

    def luminance(name: str) -> float:
        srgb = colour(name).double()
        luminous = srgb.new_tensor([0.2126, 0.7152, 0.0722])
        linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ luminous)

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def colour_pairs() -> list[tuple[str, str]]:
    """All (foreground, background) words with enough contrast to be read."""
    return [(f, b) for f in COLOURS for b in COLOURS if f != b and contrast(f, b) >= MIN_CONTRAST]


def record(text: str | int, foreground: str, background: str, task: Task = DIGIT) -> PromptRecord:
    """The caption of a text (numerals) and its attributes."""
    return {
        "prompt": task.describe(str(text), foreground, background),
        "text": str(text),
        "foreground": foreground,
        "background": background,
    }


def prompts(task: Task = DIGIT) -> list[PromptRecord]:
    """Every text of the task, in all readable pairs of colours or in some, in a fixed order."""
    pairs = colour_pairs()
    count = len(pairs) if task.pairs is None else task.pairs
    first = 0 if task.pairs is None else STRIDE
    return [
        record(text, *pairs[(number * first + index) % len(pairs)], task)
        for number, text in enumerate(task.texts)
        for index in range(count)
    ]


def as_jsonl(records: Sequence[PromptRecord]) -> str:
    """A prompt file: one JSON object per line."""
    return "".join(json.dumps(entry) + "\n" for entry in records)


def digits(split: slice) -> tuple[Tensor, Tensor]:
    """Ink masks [M, 8, 8] float32 in [0, 1] and labels [M] int64 of one split."""
    scans, labels = load_digits(return_X_y=True)
    masks = np.asarray(scans, dtype=np.float32).reshape(-1, 8, 8)[split] / 16
    return torch.from_numpy(masks), torch.from_numpy(np.asarray(labels, dtype=np.int64)[split])


def enlarge(masks: Tensor, generator: torch.Generator, task: Task = DIGIT) -> Tensor:
    """Ink masks [B L, 8, 8] -> [B, 1, H, W] in [0, 1], each digit at its own size and slant.

    It lies in the middle of its cell, give or take a sixteenth of its size. Bicubic enlargement
    leaves blurred edges; the smoothstep makes strokes of them.
    """
    count, height, width = masks.shape[0], task.height, task.width
    drawn = torch.rand(4, count, generator=generator, dtype=torch.float32, device="cpu")
    size, across, down, slant = drawn.unbind()
    tall = task.shortest + (task.tallest - task.shortest) * size
    cells = (torch.arange(task.digits, device="cpu") * 2 + 1) / task.digits - 1
    theta = masks.new_zeros(count, 2, 3)
    theta[:, 0, 0] = width / tall / task.narrowing
    theta[:, 1, 1] = height / tall
    theta[:, 0, 1] = (slant - 0.5) * 0.3
    theta[:, 0, 2] = (across - 0.5) * 0.25 - theta[:, 0, 0] * cells.repeat(count // task.digits)
    theta[:, 1, 2] = (down - 0.5) * 0.25
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    large = F.grid_sample(masks[:, None], grid, mode="bicubic", align_corners=False)
    sharp = ((large - 0.05) / 0.9).clamp(0, 1)
    strokes = sharp * sharp * (3 - 2 * sharp)
    return strokes.reshape(-1, task.digits, height, width).amax(1, keepdim=True)


def recolour(ink: Tensor, records: Sequence[PromptRecord]) -> Tensor:
    """Blend ink masks [B, 1, H, W] in [0, 1] into images [B, 3, H, W] of the captions' colours."""
    front = torch.stack([colour(r["foreground"]) for r in records])[:, :, None, None]
    back = torch.stack([colour(r["background"]) for r in records])[:, :, None, None]
    return back + ink * (front - back)


def sample(count: int, *, split: slice, generator: torch.Generator, task: Task = DIGIT) -> Batch:
    """Draw captioned images: digits of `split`, colour pairs and placement all at random."""
    masks, labels = digits(split)
    pairs = colour_pairs()
    chosen = torch.randint(len(masks), (count * task.digits,), generator=generator, device="cpu")
    drawn = torch.randint(len(pairs), (count,), generator=generator, device="cpu")
    coloured: list[int] = drawn.tolist()
    ink = enlarge(masks[chosen], generator, task)
    texts = ["".join(map(str, row)) for row in labels[chosen].reshape(count, -1).tolist()]
    records = [record(text, *pairs[pair], task) for text, pair in zip(texts, coloured, strict=True)]
    return Batch(images=recolour(ink, records), labels=labels[chosen], records=records)
