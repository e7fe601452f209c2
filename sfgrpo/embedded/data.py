"""Captioned images made from scikit-learn's 1,797 handwritten digits.

Every image is one real digit (8 x 8, 17 grey levels, UCI "Optical Recognition of Handwritten
Digits", in the scikit-learn wheel) enlarged to 32 x 32 and recoloured, so a caption such as
"a red seven on a dark blue background" has three attributes that combine freely.

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

from sfgrpo.rewards.colour import COLOURS, colour

IMAGE_SIZE = 32
PRETRAINING_DIGITS = slice(0, 1197)
JUDGE_DIGITS = slice(1197, 1797)

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

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
    """[B, 3, 32, 32] float32 in [0, 1]."""
    labels: Tensor
    """[B] int64, the digit."""
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


def record(label: int, foreground: str, background: str) -> PromptRecord:
    """The caption of a digit and its attributes."""
    article = "an" if foreground[0] in "aeiou" else "a"
    return {
        "prompt": f"{article} {foreground} {NUMERALS[label]} on a {background} background",
        "text": str(label),
        "foreground": foreground,
        "background": background,
    }


def prompts() -> list[PromptRecord]:
    """Every digit in every readable pair of colours, in a fixed order."""
    return [record(label, f, b) for label in range(10) for f, b in colour_pairs()]


def as_jsonl(records: Sequence[PromptRecord]) -> str:
    """A prompt file: one JSON object per line."""
    return "".join(json.dumps(entry) + "\n" for entry in records)


def digits(split: slice) -> tuple[Tensor, Tensor]:
    """Ink masks [M, 8, 8] float32 in [0, 1] and labels [M] int64 of one split."""
    scans, labels = load_digits(return_X_y=True)
    masks = np.asarray(scans, dtype=np.float32).reshape(-1, 8, 8)[split] / 16
    return torch.from_numpy(masks), torch.from_numpy(np.asarray(labels, dtype=np.int64)[split])


def enlarge(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Ink masks [B, 8, 8] -> [B, 1, 32, 32] in [0, 1], each at its own size, place and slant.

    The digit is 23 to 28 pixels high and moves by up to 2 in each direction. Bicubic enlargement
    leaves blurred edges; the smoothstep makes strokes of them. The scans are as wide as they are
    high, printed digits are not, hence the narrowing.
    """
    count = masks.shape[0]
    drawn = torch.rand(4, count, generator=generator, dtype=torch.float32, device="cpu")
    size, across, down, slant = drawn.unbind()
    scale = IMAGE_SIZE / (23 + 5 * size)
    theta = masks.new_zeros(count, 2, 3)
    theta[:, 0, 0] = scale / 0.85
    theta[:, 1, 1] = scale
    theta[:, 0, 1] = (slant - 0.5) * 0.3
    theta[:, 0, 2] = (across - 0.5) * 0.25
    theta[:, 1, 2] = (down - 0.5) * 0.25
    grid = F.affine_grid(theta, [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    large = F.grid_sample(masks[:, None], grid, mode="bicubic", align_corners=False)
    sharp = ((large - 0.05) / 0.9).clamp(0, 1)
    return sharp * sharp * (3 - 2 * sharp)


def recolour(ink: Tensor, records: Sequence[PromptRecord]) -> Tensor:
    """Blend ink masks [B, 1, H, W] in [0, 1] into images [B, 3, H, W] of the captions' colours."""
    front = torch.stack([colour(r["foreground"]) for r in records])[:, :, None, None]
    back = torch.stack([colour(r["background"]) for r in records])[:, :, None, None]
    return back + ink * (front - back)


def sample(count: int, *, split: slice, generator: torch.Generator) -> Batch:
    """Draw captioned images: digits of `split`, colour pairs and placement all at random."""
    masks, labels = digits(split)
    pairs = colour_pairs()
    chosen = torch.randint(len(masks), (count,), generator=generator, device="cpu")
    coloured = torch.randint(len(pairs), (count,), generator=generator, device="cpu").tolist()
    ink = enlarge(masks[chosen], generator)
    records = [
        record(label, *pairs[pair])
        for label, pair in zip(labels[chosen].tolist(), coloured, strict=True)
    ]
    return Batch(images=recolour(ink, records), labels=labels[chosen], records=records)
