"""Likeness to a source, on tiny vision models, against transformers' own path through Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BitImageProcessorPil, Dinov2Config, Dinov2Model

from sfgrpo import rewards
from sfgrpo.prompts import images
from sfgrpo.rewards import similarity
from sfgrpo.rewards._pixels import open_image
from tests.support.clip import embedded, pictures, save, to_bytes


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)
    size, crop = {"shortest_edge": 32}, {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=crop, do_convert_rgb=True).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, of several sizes."""
    path = tmp_path_factory.mktemp("sources")
    for n, size in enumerate(((32, 32), (48, 64), (70, 40))):
        Image.fromarray(to_bytes(pictures(n + 1, *size)[n].flip(0))).save(path / f"{n}.png")
    return path


def by_pillow(model: str, images: list[Image.Image]) -> Tensor:
    processor: Any = AutoImageProcessor.from_pretrained(model)
    network: Any = Dinov2Model.from_pretrained(model)
    pixels = torch.cat([processor(images=it, return_tensors="pt")["pixel_values"] for it in images])
    with torch.no_grad():
        return torch.nn.functional.normalize(network(pixels).pooler_output, dim=1)


ENTRIES = [{"image": f"{n}.png"} for n in range(3)]


@pytest.mark.parametrize("side", [32, 57])
def test_scores_are_those_of_transformers(dino: str, sources: Path, side: int) -> None:
    """To Pillow's rounding; exactly where neither image nor source is resized."""
    images = pictures(3, side, side)
    made = by_pillow(dino, [Image.fromarray(to_bytes(image)) for image in images])
    given = by_pillow(dino, [Image.open(sources / entry["image"]) for entry in ENTRIES])
    reward = similarity.build(model=dino, folder=str(sources), device="cpu", batch=2)
    scores = reward(images, [""] * 3, ENTRIES)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (made * given).sum(1), atol=2e-2, rtol=0)
    if side == 32:
        assert scores[0].item() == pytest.approx(float(made[0] @ given[0]), abs=1e-5)
    assert scores.std() > 1e-3


def test_the_source_itself_is_most_like_it(dino: str, sources: Path) -> None:
    image = open_image(str(sources / "1.png"))
    reward = similarity.build(model=dino, folder=str(sources), device="cpu")
    scores = reward(torch.stack([image, image.flip(0)]), [""] * 2, [ENTRIES[1]] * 2)
    assert scores[0].item() == pytest.approx(1, abs=1e-5)
    assert scores[1] < scores[0]


def test_sources_may_be_several_and_inline(dino: str, sources: Path) -> None:
    """As the prompts of an editing model bring them; of a list the mean."""
    reward = similarity.build(model=dino, folder=str(sources), device="cpu")
    both = [entry["image"] for entry in ENTRIES[1:]]
    inline = [images.inline({"bytes": (sources / n).read_bytes(), "path": None}) for n in both]
    entries = [*ENTRIES[1:], {"image": both}, {"image": inline}]
    reward.check([""] * 4, entries)
    first, second, mean, same = reward(pictures(1).expand(4, -1, -1, -1), [""] * 4, entries)
    assert first != second
    assert mean.item() == pytest.approx(float(first + second) / 2, abs=1e-6)
    assert same == mean


def test_a_photo_is_seen_as_it_was_held(dino: str, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[images.ORIENTATION] = 3
    upright = Image.fromarray(to_bytes(pictures(1)[0]))
    upright.rotate(180).save(tmp_path / "turned.png", exif=turned)
    reward = similarity.build(model=dino, folder=str(tmp_path), device="cpu")
    seen = open_image(str(tmp_path / "turned.png"))
    assert torch.equal(seen, torch.tensor(to_bytes(pictures(1)[0])).permute(2, 0, 1) / 255)
    score = reward(seen[None], [""], [{"image": "turned.png"}])
    assert score.item() == pytest.approx(1, abs=1e-5)


def test_of_a_clip_it_is_the_projected_embedding(tmp_path: Path, sources: Path) -> None:
    clip = save(tmp_path)
    images = pictures(1)
    source = Image.open(sources / "0.png")
    bytes_3HW = torch.tensor(list(source.tobytes())).reshape(32, 32, 3).permute(2, 0, 1)
    both = torch.stack([images[0], bytes_3HW / 255])
    made, given = embedded(clip, both, ["", ""])[0]
    options = {"model": clip, "folder": str(sources)}
    total, _ = rewards.load({"similarity": 1}, {"similarity": options})(
        images.requires_grad_(), [""], ENTRIES[:1]
    )
    assert not total.requires_grad
    torch.testing.assert_close(total[0], made @ given, atol=1e-5, rtol=0)


def test_metadata_without_an_image_are_refused(dino: str, sources: Path) -> None:
    reward = similarity.build(model=dino, folder=str(sources), device="cpu")
    reward.check([""] * 3, ENTRIES)
    with pytest.raises(KeyError, match="no metadata 'image'"):
        reward.check([""], [{}])
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*9\.png'"):
        reward.check([""], [{"image": "9.png"}])
    assert reward(torch.empty(0, 3, 8, 8), [], []).shape == (0,)
