"""The reward of readable text: lines drawn with a real font, read by the real engine."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfgrpo import prompts, rewards
from sfgrpo.rewards import text

SIDE = 320
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw(words: str, *, ink: str = "black", paper: str = "white", turn: float = 0) -> Tensor:
    """An image [3, SIDE, SIDE] of the words."""
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, 34)
    pen.multiline_text((SIDE / 2, SIDE / 2), words, fill=ink, font=font, anchor="mm")
    turned = picture.rotate(turn, fillcolor=paper)
    return torch.from_numpy(np.array(turned)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reader() -> text.TextReward:
    return text.build(threads=1, side=SIDE)


def score(reader: text.TextReward, target: str, *images: Tensor) -> list[float]:
    count = len(images)
    return reader(torch.stack(images), [""] * count, [{"text": target}] * count).tolist()


def test_right_text_scores_highest(reader: text.TextReward) -> None:
    right, wrong_letter, other, blank = score(
        reader, "OPEN LATE", *map(draw, ("OPEN LATE", "OPEM LATE", "Biscuits", ""))
    )
    assert right == 1
    assert wrong_letter == 1 - 1 / 8
    assert other < 0.3
    assert blank == 0


def test_case_space_and_lines_do_not_matter(reader: text.TextReward) -> None:
    images = [
        draw("open late"),
        draw("OPEN\nLATE"),
        draw("OPEN LATE", ink="gold", paper="navy"),
        draw("OPEN LATE", turn=12),
    ]
    assert score(reader, "Open Late", *images) == [1, 1, 1, 1]


def test_text_of_the_package_s_own_prompts_is_read(reader: text.TextReward) -> None:
    """Over targets with digits and punctuation, drawn plainly, the engine errs seldom."""
    asked = prompts.load("signs")[::20]
    images = torch.stack([draw(p.metadata["text"].replace(" ", "\n")) for p in asked])
    found = reader(images, [p.text for p in asked], [p.metadata for p in asked])
    assert found.mean() > 0.95
    quoted = text.build(target="quoted", threads=1, side=SIDE)
    assert torch.equal(quoted(images, [p.text for p in asked], [{}] * len(asked)), found)


def test_a_score_is_the_same_in_every_batch_and_call(reader: text.TextReward) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([draw(w) for w in ("OPEN LATE", "OPEN LAKE", "0PEN", "PEN AND INK")])
    images = (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    together = score(reader, "OPEN LATE", *images)
    assert together == score(reader, "OPEN LATE", *images)
    assert together == [score(reader, "OPEN LATE", image)[0] for image in images]


def test_more_text_than_asked_for_costs_unless_anywhere(reader: text.TextReward) -> None:
    image = draw("WE ARE\nOPEN LATE\nTODAY")
    assert score(reader, "OPEN LATE", image)[0] == 0
    generous = text.build(anywhere=True, threads=1, side=SIDE)
    assert score(generous, "OPEN LATE", image)[0] == 1


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert text.edit_distance(a, b) == text.edit_distance(b, a) == distance


def test_normalise() -> None:
    assert text.normalise(" Straße\t5 €！\n") == "strasse5€!"


def test_what_cannot_be_scored_is_named(reader: text.TextReward) -> None:
    image = draw("A")[None]
    with pytest.raises(KeyError, match=r"prompt 'a sign' has no metadata 'text'.*target: quoted"):
        reader(image, ["a sign"], [{"txt": "A"}])
    for wrong in ("  ", 7):
        with pytest.raises(ValueError, match=f"nothing to read in {wrong!r}, of prompt 'a sign'"):
            reader(image, ["a sign"], [{"text": wrong}])
    quoted = text.build(target="quoted", threads=1)
    with pytest.raises(ValueError, match="no text in double quotes in prompt 'a \"sign'"):
        quoted(image, ['a "sign'], [{}])
    with pytest.raises(ValueError, match="unknown option 'thread'; did you mean 'threads'"):
        rewards.load({"text": 1}, {"text": {"thread": 1}})
    with pytest.raises(ValueError, match="side >= 32"):
        text.build(side=8)
    with pytest.raises(ValueError, match="target must be 'metadata' or 'quoted', got 'prompt'"):
        rewards.load({"text": 1}, {"text": {"target": "prompt"}})
    assert reader(torch.empty(0, 3, 32, 32), [], []).shape == (0,)
