"""Detectors that are asked in words, beside transformers' own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from sfgrpo.rewards import _zero_shot
from sfgrpo.rewards._detector import Found
from sfgrpo.rewards._weights import Place
from sfgrpo.rewards._zero_shot import ZeroShot
from tests.support import detectors
from tests.support.clip import pictures, to_bytes

CPU = Place.of("geneval", device="cpu", dtype="fp32", batch=2)
ASKED = [("red cup", "dog"), ("mouse", "dog"), ("red cup", "dog"), ("red cup", "dog")]
TOKENS = {("red cup", "dog"): [[1, 2], [4]], ("mouse", "dog"): [[1, 2], [4]]}
"""Of each class in "[CLS] red cup . dog . [SEP]" and in "[CLS] mo ##use . dog . [SEP]"."""


class Alone:
    """transformers' own network and processor, of one image at a time."""

    def __init__(self, folder: str) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.network: Any = AutoModelForZeroShotObjectDetection.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, image: Tensor, texts: list[str]) -> Any:
        given = self.processor(images=[to_bytes(image)], text=[texts], return_tensors="pt")
        return self.network(**given)


def flat(found: dict[str, list[Found]]) -> list[tuple[str, float, tuple[float, ...]]]:
    objects = [(name, it.score, it.box) for name, them in found.items() for it in them]
    return sorted(objects, key=lambda each: -each[1])


def same(ours: dict[str, list[Found]], expected: list[tuple[str, float, list[float]]]) -> None:
    expected = sorted(expected, key=lambda each: -each[1])
    assert [name for name, _, _ in flat(ours)] == [name for name, _, _ in expected]
    for (_, score, box), (_, sure, around) in zip(flat(ours), expected, strict=True):
        assert score == pytest.approx(sure, abs=1e-5)
        assert box == pytest.approx(tuple(around), abs=1e-3)


@pytest.fixture(autouse=True)
def every_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those seen twice, too, as transformers gives them."""
    monkeypatch.setattr(_zero_shot, "OVERLAP", 1.0)


def test_owl_s_objects_are_transformers(tmp_path: Path) -> None:
    folder = detectors.owl(tmp_path)
    images = pictures(4, 48, 64)
    found = ZeroShot(CPU, model=folder)(images, threshold=0.3, asked=ASKED)
    assert {name for each in found for name in each} == {"red cup", "mouse", "dog"}
    alone = Alone(folder)
    for image, names, ours in zip(images, ASKED, found, strict=True):
        outputs = alone(image, [f"a photo of a {name}" for name in names])
        (theirs,) = alone.processor.post_process_grounded_object_detection(
            outputs, threshold=0.3, target_sizes=[(48, 64)], text_labels=[[*names]]
        )
        limit = torch.tensor([64, 48, 64, 48])
        boxes = theirs["boxes"].clamp(min=0).minimum(limit).tolist()
        same(ours, [*zip(theirs["text_labels"], theirs["scores"].tolist(), boxes, strict=True)])


def test_grounding_dino_s_classes_have_the_mean_of_their_tokens(tmp_path: Path) -> None:
    folder = detectors.dino(tmp_path)
    images = pictures(4, 48, 64)
    found = ZeroShot(CPU, model=folder)(images, threshold=0.3, asked=ASKED)
    assert {name for each in found for name in each} == {"red cup", "mouse", "dog"}
    alone = Alone(folder)
    for image, names, ours in zip(images, ASKED, found, strict=True):
        outputs = alone(image, [*names])
        chances = outputs.logits[0].sigmoid()
        expected = []
        for query, (x, y, w, h) in enumerate(outputs.pred_boxes[0].tolist()):
            scores = [float(chances[query, own].mean()) for own in TOKENS[names]]
            best = max(range(len(names)), key=scores.__getitem__)
            box = [64 * (x - w / 2), 48 * (y - h / 2), 64 * (x + w / 2), 48 * (y + h / 2)]
            if scores[best] > 0.3:
                limits = (64, 48, 64, 48)
                inside = [min(max(v, 0), most) for v, most in zip(box, limits, strict=True)]
                expected.append((names[best], scores[best], inside))
        same(ours, expected)


def test_an_object_seen_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_zero_shot, "OVERLAP", 0.5)
    boxes = [(0.0, 0.0, 4.0, 4.0), (0.0, 1.0, 4.0, 4.0), (0.0, 2.0, 4.0, 4.0), (4.0, 0.0, 8.0, 4.0)]
    objects = [Found(box, 0.9 - n / 10) for n, box in enumerate(boxes)]
    assert [_zero_shot.overlap(boxes[0], box) for box in boxes] == [1, 0.75, 0.5, 0]
    assert _zero_shot.once(objects) == [objects[0], objects[2], objects[3]]
    assert _zero_shot.overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_other_models_are_not_taken_for_them(tmp_path: Path) -> None:
    assert _zero_shot.knows(detectors.owl(tmp_path / "owl"))
    assert not _zero_shot.knows(detectors.boxes(tmp_path / "boxes"))
