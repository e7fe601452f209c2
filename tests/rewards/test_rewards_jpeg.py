"""JPEG's compressibility, by Pillow's own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sfgrpo import rewards
from sfgrpo.rewards import jpeg
from tests.support.clip import pictures, to_bytes


def test_scores_are_the_sizes_of_files(tmp_path: Path) -> None:
    images = pictures(3, 40, 56)
    sizes = []
    for image in images:
        Image.fromarray(to_bytes(image)).save(tmp_path / "it.jpg", quality=95)
        sizes.append((tmp_path / "it.jpg").stat().st_size / 1000)
    small = jpeg.build(goal="compressibility")
    large = jpeg.build(goal="incompressibility")
    assert large(images, [""] * 3, [{}] * 3).tolist() == pytest.approx(sizes)
    assert small(images, [""] * 3, [{}] * 3).tolist() == pytest.approx([-size for size in sizes])


def test_the_plain_image_is_the_smallest_and_noise_the_largest() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full((1, 3, 64, 64), 0.5), pictures(1, 64, 64), noise])
    _, parts = rewards.load({"jpeg": 1})(images, [""] * 3, [{}] * 3)
    plain, smooth, loud = parts["jpeg"].tolist()
    assert 0 > plain > smooth > loud


def test_values_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match=r"goal must be one of .* got 'size'"):
        rewards.build("jpeg", goal="size")
    with pytest.raises(ValueError, match="quality must be from 1 to 95, got 100"):
        rewards.build("jpeg", quality=100)
    assert jpeg.build()(torch.empty(0, 3, 8, 8), [], []).shape == (0,)
