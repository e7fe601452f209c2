"""The pictures, videos and other samples that a run keeps of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import save_file
from torch import Tensor

from sfgrpo import files
from sfgrpo.evaluate import Evaluation
from sfgrpo.prompts import Prompt, images

FRAME_RATE = 16
"""Frames a second of the videos that are kept; Wan's."""


def save_videos(folder: Path, iteration: int, videos: Tensor) -> None:
    """Keep videos [K, F, 3, H, W] as `videos/<iteration>-<k>.webp`, which browsers play."""
    place = folder / "videos"
    place.mkdir(exist_ok=True)
    for k, video in enumerate(rearrange(videos, "k f c h w -> k f h w c").numpy()):
        first, *rest = map(Image.fromarray, video)
        with files.replacing(place / f"{iteration:06d}-{k}.webp") as aside:
            first.save(
                aside, save_all=True, append_images=rest, duration=1000 // FRAME_RATE, loop=0
            )


def kept(folder: Path, iteration: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images uint8 `[P, N, 3, H, W]` that an evaluation kept; None if they are gone, or are of
    another shape."""
    path = folder / "images" / f"{iteration:06d}.png"
    if not path.is_file():
        return None
    with PngImageFile(path) as grid:  # not Image.open: a large grid is no attack
        pixels = np.asarray(grid)
    prompts, images, channels, height, width = shape
    if pixels.shape != (prompts * height, images * width, channels):
        return None
    return rearrange(pixels, "(p h) (n w) c -> p n c h w", p=prompts, n=images)


def save_sources(place: Path, prompts: Sequence[Prompt], height: int) -> None:
    """Keep what prompts bring as `sources/<row>.png`, `height` pixels high and side by side; once,
    since all evaluations of a run show the same prompts."""
    for row, prompt in enumerate(prompts):
        path = place / "sources" / f"{row:04d}.png"
        if not prompt.images or path.is_file():
            continue
        path.parent.mkdir(exist_ok=True)
        found = [images.opened(source) for source in prompt.images]
        shown = [it.resize((max(1, round(it.width * height / it.height)), height)) for it in found]
        with files.replacing(path) as aside:
            Image.fromarray(np.concatenate([np.asarray(it) for it in shown], 1)).save(aside)


def save_samples(folder: Path, iteration: int, evaluation: Evaluation) -> None:
    """Keep an evaluation's images as `images/<iteration>.png`, a row per line of `prompts.txt`, and
    those that its prompts bring in `images/sources`; what is no image as
    `samples/<iteration>.safetensors`."""
    samples_PN = evaluation.samples_PN
    pictures = samples_PN.dtype == torch.uint8
    place = folder / ("images" if pictures else "samples")
    place.mkdir(exist_ok=True)
    suffix = "png" if pictures else "safetensors"
    with files.replacing(place / f"{iteration:06d}.{suffix}") as aside:
        if pictures:
            grid = rearrange(samples_PN, "p n c h w -> (p h) (n w) c")
            Image.fromarray(grid.numpy()).save(aside)
            save_sources(place, evaluation.prompts, samples_PN.shape[-2])
        else:
            save_file({"samples": samples_PN.contiguous()}, aside)
    if evaluation.videos is not None:
        save_videos(folder, iteration, evaluation.videos)
    lines = "".join(" ".join(prompt.text.split()) + "\n" for prompt in evaluation.prompts)
    files.write(place / "prompts.txt", lines)
