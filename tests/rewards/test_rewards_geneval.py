"""GenEval: its rules beside the published code's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import rewards
from sfgrpo.rewards import geneval
from sfgrpo.rewards._detector import Box, Found
from tests.support import detectors
from tests.support.clip import pictures, save


def at(left: float, top: float, size: float = 20, score: float = 0.95) -> Found:
    return Found((left, top, left + size, top + size), score)


OBJECTS = {
    "cup": [at(10, 100), at(200, 100)],
    "dog": [at(100, 102)],
    "cat": [at(100, 20), at(104, 30)],
}


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


CASES: list[tuple[list[dict], list[dict], bool, bool, float]] = [
    ([clause("cup")], [], True, False, 0.0),
    ([clause("cup")], [clause("cup", 2)], False, False, 0.0),
    ([clause("cup", 2)], [clause("cup", 3)], True, True, 1.0),
    ([clause("cup", 3)], [], False, False, 2 / 3),
    ([clause("bird")], [], False, False, 0.0),
    ([clause("dog"), clause("bird", color="red")], [], False, False, 1 / 3),
    ([clause("dog", color="red")], [], True, True, 1.0),
    ([clause("dog", color="blue")], [], False, False, 0.5),
    ([clause("cup", 2, color="red")], [], False, False, 0.75),
    ([clause("cup", color="blue"), clause("dog")], [], True, False, 1 / 3),
    ([clause("dog"), clause("cat", 2, position=["above", 0])], [], True, True, 1.0),
    ([clause("dog"), clause("cat", 2, position=["below", 0])], [], False, False, 0.75),
    ([clause("dog"), clause("cat", 1, position=["above", 0])], [], True, False, 1 / 3),
    ([clause("dog"), clause("cup", 2, position=["left of", 0])], [], False, False, 0.75),
    ([clause("bird"), clause("dog", position=["left of", 0])], [], False, False, 1 / 3),
]
"""Include, exclude, and what GenEval's `evaluate` and Flow-GRPO's `evaluate_reward` say."""


@pytest.mark.parametrize(("include", "exclude", "correct", "strict", "partial"), CASES)
def test_verdicts_are_the_published_code_s(
    include: list[dict], exclude: list[dict], correct: bool, strict: bool, partial: float
) -> None:
    def colours(found: Sequence[Found], name: str) -> list[str]:
        return ["blue" if it.box[0] == 10 else "red" for it in found]

    entry = {"include": include, "exclude": exclude}
    assert geneval.judge(OBJECTS, entry, colours, exact=False)[0] == correct
    there, share = geneval.judge(OBJECTS, entry, colours, exact=True)
    assert there == strict
    assert share == pytest.approx(partial)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 100, 20, 120), {"left of"}),
        ((200, 110, 220, 130), {"right of"}),
        ((100, 0, 120, 20), {"above"}),
        ((96, 300, 116, 320), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((102, 101, 122, 121), set()),
        ((104, 100, 124, 120), set()),  # 0.1 of both sizes
    ],
)
def test_relations_are_the_published_code_s(box: Box, expected: set[str]) -> None:
    assert geneval.relations(box, (100, 100, 120, 120)) == expected


class Told:
    """A detector that finds what it was told, of every image."""

    labels = ("cup", "dog", "mouse")

    def __init__(self, objects: dict[str, list[Found]]) -> None:
        self.objects = objects

    def __call__(
        self, images: Tensor, *, threshold: float, asked: Sequence[tuple[str, ...]]
    ) -> list[dict[str, list[Found]]]:
        assert threshold == 0.3
        assert len(asked) == len(images)
        return [self.objects] * len(images)


class Hues:
    """Embeds an image as its mean colour, and a text as what of red and blue is named in it."""

    def images(self, images: Tensor) -> Tensor:
        hues = images - images.amin(1, keepdim=True)  # grey is none
        return torch.nn.functional.normalize(hues.mean((2, 3)), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        found = [[float("red" in text), 0, float("blue" in text)] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(found), dim=1)


def told(objects: dict[str, list[Found]], score: str = "correct") -> geneval.GenEval:
    return geneval.GenEval(
        Told(objects), Hues(), score=score, thresholds=(0.3, 0.9)  # pyright: ignore
    )  # fmt: skip


def test_counting_needs_surer_objects() -> None:
    reward = told({"cup": [at(0, 0, score=0.95), at(40, 40, score=0.5)]})
    two = {"include": [clause("cup", 2)]}
    entries = [two, {**two, "tag": "counting"}, {**two, "tag": "two_object"}]
    assert reward(pictures(3), [""] * 3, entries).tolist() == [1, 0, 1]


def test_a_class_by_geneval_s_name_is_the_detector_s() -> None:
    reward = told({"mouse": [at(0, 0)]})
    for name in ("mouse", "computer mouse"):
        entry = {"include": [clause(name)]}
        reward.check([""], [entry])
        assert reward(pictures(1), [""], [entry]).tolist() == [1]


def test_colours_are_of_the_object_alone() -> None:
    """Red within the mask, blue around it in the box, white elsewhere."""
    image = torch.ones(1, 3, 32, 32)
    image[..., 8:24, 8:24] = torch.tensor([0, 0, 1.0])[:, None, None]
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[10:14, 9:23] = True
    image[:, :, mask] = torch.tensor([1.0, 0, 0])[:, None]
    box = (8.2, 7.8, 24.4, 24.0)
    for found, colour in ((Found(box, 0.99, mask), "red"), (Found(box, 0.99), "blue")):
        reward = told({"cup": [found]})
        entries = [{"include": [clause("cup", color=word)]} for word in ("red", "blue")]
        scores = reward(image.repeat(2, 1, 1, 1), [""] * 2, entries).tolist()
        assert scores == [float(word == colour) for word in ("red", "blue")]
    cut = geneval.cut_out(image[0], Found(box, 0.99, mask))
    assert cut.shape == (3, 16, 16)
    assert cut[:, -1, -1].tolist() == pytest.approx([0.6] * 3)
    assert geneval.cut_out(image[0], Found((31.8, 31.9, 32, 32), 0.9)).shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "no metadata 'include'"),
        ({"include": [{"class": "cup"}]}, "an object needs 'class' and 'count'"),
        ({"include": [clause("cub")]}, "unknown class 'cub'; did you mean 'cup'"),
        ({"include": [clause("cup", 0)]}, "count must be a whole number from 1, got 0"),
        ({"include": [clause("cup", color="rde")]}, "unknown color 'rde'; did you mean 'red'"),
        ({"include": [clause("cup", position=["left of", 0])]}, "position must be one of"),
        ({"include": [clause("cup"), clause("dog", position=["on", 0])]}, "position must be"),
        ({"include": [clause("cup")], "exclude": [clause("bird")]}, "unknown class 'bird'"),
    ],
)
def test_metadata_in_another_format_are_refused(entry: dict, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        told({}).check(["a prompt"], [entry])


def test_it_is_a_reward_of_the_recipe(tmp_path: Path) -> None:
    clip, boxes = save(tmp_path / "clip"), detectors.boxes(tmp_path / "boxes")
    options = {"detector": boxes, "clip": clip, "score": "partial", "threshold": 0.1}
    mixture = rewards.load({"geneval": 1}, {"geneval": options})
    entry = {"include": [clause("cup", 2, color="red"), clause("dog", position=["above", 0])]}
    total, _ = mixture(pictures(3, 40, 40).requires_grad_(), ["a prompt"] * 3, [entry] * 3)
    assert not total.requires_grad
    assert ((total >= -3) & (total <= 1)).all()
    alone = [mixture(im[None], ["a prompt"], [entry])[0] for im in pictures(3, 40, 40)]
    torch.testing.assert_close(total, torch.cat(alone))


def test_a_detector_may_be_asked_in_words(tmp_path: Path) -> None:
    """For classes that COCO does not have, too."""
    clip, dino = save(tmp_path / "clip"), detectors.dino(tmp_path / "dino")
    reward: Any = rewards.build("geneval", detector=dino, clip=clip, threshold=0.9)
    cup = {"include": [clause("red cup", 2), clause("dog")], "exclude": [clause("mouse")]}
    assert geneval.classes(cup) == ("red cup", "dog", "mouse")
    reward.check(["a prompt"], [cup])
    for name in ("a. b", "", 3):
        with pytest.raises(ValueError, match="class must be words without a full stop, got "):
            reward.check(["a prompt"], [{"include": [{"class": name, "count": 1}]}])
    images, entries = pictures(3, 48, 64), [cup, {"include": [clause("mouse")]}, cup]
    found = reward._detector(images, threshold=0.9, asked=[*map(geneval.classes, entries)])
    expected = [
        float(all(len(it.get(c["class"], [])) >= c["count"] for c in entry["include"]))
        * all(len(it.get(c["class"], [])) < c["count"] for c in entry.get("exclude", []))
        for it, entry in zip(found, entries, strict=True)
    ]
    assert reward(images, ["a prompt"] * 3, entries).tolist() == expected
    assert set(expected) == {0, 1}


def test_values_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .* got 'soft'"):
        rewards.build("geneval", score="soft")
    with pytest.raises(ValueError, match="counting_threshold must be from 0 and below 1, got 1"):
        rewards.build("geneval", counting_threshold=1)
