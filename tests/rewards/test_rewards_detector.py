"""Detectors beside transformers' own path through Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    Mask2FormerForUniversalSegmentation,
    YolosForObjectDetection,
)

from sfgrpo.rewards._detector import Detector, Found
from sfgrpo.rewards._weights import Place
from tests.support import detectors
from tests.support.clip import pictures, save, to_bytes
from tests.support.detectors import NAMES

CPU = Place.of("geneval", device="cpu", dtype="fp32", batch=3)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return detectors.masks(tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return detectors.boxes(tmp_path_factory.mktemp("boxes"))


def opened(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(to_bytes(image)) for image in images]


def flat(found: dict[str, list[Found]]) -> list[tuple[str, float]]:
    pairs = [(name, it.score) for name, objects in found.items() for it in objects]
    return sorted(pairs, key=lambda pair: -pair[1])


def test_masks_are_those_of_transformers(masks: str) -> None:
    """Where nothing is resized transformers' own instances are mmdetection's, and ours."""
    images = pictures(3, 384, 384)
    found = Detector(CPU, model=masks)(images, threshold=0.2)
    processor: Any = AutoImageProcessor.from_pretrained(masks)
    network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(masks)
    with torch.no_grad():
        outputs = network(**processor(images=opened(images), return_tensors="pt"))
    expected = processor.post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)] * 3, return_binary_maps=True
    )
    assert sum(len(it["segments_info"]) for it in expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        infos = sorted(theirs["segments_info"], key=lambda info: -info["score"])
        assert [name for name, _ in flat(ours)] == [NAMES[info["label_id"]] for info in infos]
        scores = [score for _, score in flat(ours)]
        assert scores == pytest.approx([info["score"] for info in infos], abs=2e-6)
        by_score = {it.score: it for objects in ours.values() for it in objects}
        for info, score in zip(infos, scores, strict=True):
            mask = theirs["segmentation"][info["id"]].bool()
            there = by_score[score].mask
            assert there is not None
            assert (there != mask).sum() <= 3  # of 147,456: a logit is 0 but for rounding
            where = there.nonzero()
            top, left = where.min(0).values.tolist()
            bottom, right = (where.max(0).values + 1).tolist()
            assert by_score[score].box == (left, top, right, bottom)


def test_boxes_are_those_of_transformers(boxes: str) -> None:
    images = pictures(3, 32, 48)
    found = Detector(CPU, model=boxes)(images, threshold=0.4)
    processor: Any = AutoImageProcessor.from_pretrained(boxes)
    network: Any = YolosForObjectDetection.from_pretrained(boxes)
    with torch.no_grad():
        outputs = network(**processor(images=opened(images), return_tensors="pt"))
    expected = processor.post_process_object_detection(
        outputs, threshold=0.4, target_sizes=[(32, 48)] * 3
    )
    assert sum(len(it["scores"]) for it in expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        order = theirs["scores"].argsort(descending=True)
        assert [name for name, _ in flat(ours)] == [NAMES[int(n)] for n in theirs["labels"][order]]
        at_most = torch.tensor([48, 32, 48, 32])
        clipped = theirs["boxes"].clamp(min=0).minimum(at_most)[order]
        by_score = sorted((it for o in ours.values() for it in o), key=lambda it: -it.score)
        torch.testing.assert_close(torch.tensor([it.box for it in by_score]), clipped)


def test_sizes_that_the_detector_pads_are_cut_back(masks: str) -> None:
    for it in Detector(CPU, model=masks)(pictures(2, 40, 70), threshold=0.2):
        for found in (found for objects in it.values() for found in objects):
            assert found.mask is not None
            assert found.mask.shape == (40, 70)
            assert found.box[2] <= 70
            assert found.box[3] <= 40


def test_a_network_that_detects_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of type clip, expected a detector"):
        Detector(CPU, model=save(tmp_path))
