"""PickScore on a tiny CLIP with random weights, against transformers' own path through Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPModel

from sfgrpo import rewards
from sfgrpo.embedded import architecture
from sfgrpo.rewards import pickscore
from sfgrpo.rewards._pixels import Preprocess
from tests.support.clip import SIDE, pictures, prepare, save, to_bytes

PROMPTS = ["a red seven", "a white one on a black background", "a red seven", "nine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("clip"))


def build(folder: str, **options: Any) -> pickscore.PickScore:
    return pickscore.build(model=folder, processor=folder, device="cpu", **options)


def by_pillow(folder: str, images: Tensor, prompts: list[str]) -> Tensor:
    """PickScore as its authors compute it."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder)
    opened = [Image.fromarray(to_bytes(image)) for image in images]
    inputs = processor(
        text=prompts, images=opened, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal() / 26


def test_scores_are_those_of_transformers(folder: str) -> None:
    """At the processor's own size nothing is resized, and nothing is rounded."""
    images = pictures(4)
    scores = build(folder)(images, PROMPTS, [{}] * 4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, by_pillow(folder, images, PROMPTS), atol=2e-6, rtol=1e-5)
    assert scores.std() > 1e-3  # images differ


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 90), (91, 33), (20, 17)])
def test_resizing_and_cropping_are_pillow_s_to_rounding(
    folder: str, height: int, width: int
) -> None:
    images = pictures(3, height, width)
    processor: Any = AutoProcessor.from_pretrained(folder)
    ours = Preprocess.of(processor.image_processor, folder)(images)
    pillow = processor.image_processor(
        [Image.fromarray(to_bytes(image)) for image in images], return_tensors="pt"
    )["pixel_values"]
    assert ours.shape == pillow.shape == (3, 3, SIDE, SIDE)
    std = ours.new_tensor(processor.image_processor.image_std)[:, None, None]
    # Pillow rounds to eight bits after each of the two directions.
    assert ((ours - pillow) * std).abs().max() < 1.5 / 255
    scores = build(folder)(images, PROMPTS[:3], [{}] * 3)
    torch.testing.assert_close(scores, by_pillow(folder, images, PROMPTS[:3]), atol=5e-3, rtol=0)


def test_scores_do_not_depend_on_the_batch(folder: str) -> None:
    images = pictures(4)
    together = build(folder)(images, PROMPTS, [{}] * 4)
    for reward in (build(folder, batch=1), build(folder, batch=3)):
        torch.testing.assert_close(reward(images, PROMPTS, [{}] * 4), together)
    turned = build(folder)(images.flip(0), PROMPTS[::-1], [{}] * 4)
    torch.testing.assert_close(turned.flip(0), together)


def test_long_prompts_are_cut(folder: str) -> None:
    long = " ".join(["red"] * 200)
    assert build(folder)(pictures(1), [long], [{}]).isfinite().all()


def test_half_precision(folder: str) -> None:
    images = pictures(4)
    full = build(folder)(images, PROMPTS, [{}] * 4)
    half = build(folder, dtype="bf16")(images.bfloat16(), PROMPTS, [{}] * 4)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.02, rtol=0)


def test_it_is_a_reward_of_the_recipe_and_holds_no_gradient(folder: str) -> None:
    options = {"model": folder, "processor": folder, "device": "auto"}
    mixture = rewards.load({"pickscore": 2.0}, {"pickscore": options}, frames=2)
    total, parts = mixture(pictures(2).requires_grad_(), PROMPTS[:2], [{}] * 2)
    torch.testing.assert_close(total, 2 * parts["pickscore"])
    assert not total.requires_grad
    video = pictures(6).unflatten(0, (2, 3))
    _, parts = mixture(video, PROMPTS[:2], [{}] * 2)
    ends = [build(folder)(video[:, f], PROMPTS[:2], [{}] * 2) for f in (0, 2)]
    torch.testing.assert_close(parts["pickscore"], torch.stack(ends).mean(0))
    assert build(folder)(torch.empty(0, 3, SIDE, SIDE), [], []).shape == (0,)


def test_what_cannot_be_used_is_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option 'modle'; did you mean 'model'"):
        rewards.load({"pickscore": 1}, {"pickscore": {"modle": folder}})
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'fp8'"):
        rewards.load({"pickscore": 1}, {"pickscore": {"dtype": "fp8"}})
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        build(folder, batch=0)
    encoder = tmp_path / "encoder"
    architecture.build_text_encoder().save_pretrained(encoder)
    with pytest.raises(ValueError, match="expected a CLIP model"):
        build(str(encoder))
    for changes in (
        {"do_center_crop": False},
        {"resample": 2},
        {"size": {"height": 9, "width": 9}},
    ):
        prepare(tmp_path, **changes)
        with pytest.raises(ValueError, match="prepares images otherwise than CLIP"):
            Preprocess.of(CLIPImageProcessorPil.from_pretrained(tmp_path), "it")


def test_pickled_weights_are_refused(folder: str, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        pickscore.build(model=str(tmp_path), processor=folder)
