"""Pictures and videos of a run, small enough for a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sfgrpo.report.markup import image

SIDE = 160
"""Pixels of an image's longer side in a page; of smaller images, all they have."""
TINY = 64
"""Images of at most so many pixels are enlarged pixel by pixel, and kept without loss."""
ROW_BYTES, VIDEO_BYTES = 32_000, 90_000
"""What the images of a prompt and a video may take, so that a page of them stays below 3 MB."""


class Grid:
    """The kept images of one evaluation: a row of one picture for each prompt, whose images stand
    side by side without a gap."""

    def __init__(self, path: Path, prompts: int, columns: int = 1) -> None:
        # Not Image.open, which takes a picture of more than 179 megapixels for an attack.
        with PngImageFile(path) as picture:
            self.pixels = np.asarray(picture)
        self.side, self.columns = len(self.pixels) // prompts, columns

    def row(self, prompt: int, alt: str) -> str:
        """The images of a prompt, side by side, as a part of a page."""
        pixels = self.pixels[self.side * prompt : self.side * (prompt + 1)]
        return picture(apart(pixels, self.columns), alt, height=self.side)


def apart(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Pixels [H, W, ...] with white between their equal columns; as they are if those do not fit:
    a line of writing in one image must not go on in the next."""
    if columns < 2 or pixels.shape[1] % columns:
        return pixels
    parts = np.split(pixels, columns, axis=1)
    gap = np.full_like(pixels[:, : max(1, len(pixels) // 12)], 255)
    return np.concatenate([part for each in parts for part in (gap, each)][1:], axis=1)


def prompts(run: Path) -> list[str]:
    """The prompts that evaluations show, in the order of the grid's rows; none without images."""
    path = run / "images" / "prompts.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def source(run: Path, prompt: int, alt: str) -> str:
    """What a prompt brought, as a part of a page; nothing if it brought no image."""
    path = run / "images" / "sources" / f"{prompt:04d}.png"
    if not path.is_file():
        return ""
    with PngImageFile(path) as kept:
        pixels = np.asarray(kept)
    return picture(pixels, alt, height=len(pixels))


def picture(pixels: np.ndarray, alt: str, *, height: int) -> str:
    """Pixels `[H, W, 3]`, or `[H, W]` grey, whose images are `height` high."""
    shown, buffer = Image.fromarray(pixels), io.BytesIO()
    if height <= TINY:
        shown.save(buffer, "png", optimize=True)
        return image(buffer.getvalue(), alt, "png", pixels=True)
    whole, data, side, quality = shown, b"", SIDE, 82
    while not data or (len(data) > ROW_BYTES and side > 16):
        scale, buffer = min(1.0, side / height), io.BytesIO()
        size = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
        whole.resize(size).save(buffer, "jpeg", quality=quality)
        data, side, quality = buffer.getvalue(), side * 7 // 8, max(50, quality - 12)
    return image(data, alt, "jpeg")


def video(path: Path, alt: str) -> str:
    """A video that plays by itself, smaller and coarser as far as its place in the page asks."""
    data = path.read_bytes()
    side, quality = 2 * SIDE, 75
    while len(data) > VIDEO_BYTES and side > 16:
        data, side, quality = _smaller(path, side, quality), side * 3 // 4, max(30, quality - 15)
    return image(data, alt, "webp")


def _smaller(path: Path, side: int, quality: int) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as shown:
        frames, duration = [], shown.info.get("duration", 62)
        for k in range(getattr(shown, "n_frames", 1)):
            shown.seek(k)
            frame = shown.convert("RGB")
            frame.thumbnail((side, side))
            frames.append(frame)
    frames[0].save(
        buffer, "webp", save_all=True, append_images=frames[1:], duration=duration, loop=0,
        quality=quality, method=2,
    )  # fmt: skip
    return buffer.getvalue()


def spread(count: int, shown: int) -> Sequence[int]:
    """`shown` of `count` places, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(shown, count)).round().astype(int)).tolist()
