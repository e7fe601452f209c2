"""CLIPScore on a tiny CLIP with random weights, against transformers' own path through Pillow."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from sfgrpo import rewards
from sfgrpo.rewards._pixels import Preprocess
from sfgrpo.rewards.clipscore import ClipScore
from tests.support.clip import SIDE, embedded, pictures, save

PROMPTS = ["a red seven", "a white one on a black background", "a red seven", "nine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("clip"))


def clipscore(folder: str, **options: Any) -> Any:
    return rewards.build("clipscore", model=folder, device="cpu", **options)


def test_clipscore_is_the_paper_s(folder: str) -> None:
    images = pictures(4)
    image, text = embedded(folder, images, [f"A photo depicts {p}" for p in PROMPTS])
    expected = 2.5 * (image * text).sum(1).clamp(min=0)
    scores = clipscore(folder)(images, PROMPTS, [{}] * 4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=1e-5)
    plain = clipscore(folder, prefix="")(images, PROMPTS, [{}] * 4)
    assert (plain - scores).abs().max() > 1e-3


def test_clipscore_below_zero_is_none() -> None:
    class Opposed:
        def cosines(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.tensor([-0.5, 0.2])

    for scale, expected in (("clipscore", [0, 0.5]), ("torchmetrics", [-50, 20])):
        reward = ClipScore(Opposed(), scale=scale, prefix="")  # pyright: ignore[reportArgumentType]
        assert reward(pictures(2), PROMPTS[:2], []).tolist() == pytest.approx(expected)


def test_clipscore_is_torchmetrics(folder: str) -> None:
    images = pictures(4)
    image, text = embedded(folder, images, PROMPTS)
    scores = clipscore(folder, scale="torchmetrics", batch=3)(images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores, 100 * (image * text).sum(1), atol=2e-4, rtol=1e-5)


def test_clipscore_warns_of_prompts_that_are_cut(folder: str) -> None:
    fits = " ".join(["red"] * 10)  # with begin and end twelve tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipscore(folder, prefix="").check([fits], [{}])
    with pytest.warns(UserWarning, match="reward 'clipscore': 1 of 2 prompts are longer than"):
        clipscore(folder, prefix="red ").check([fits, "", fits], [{}] * 3)


def test_values_that_make_no_sense_are_named(folder: str) -> None:
    with pytest.raises(ValueError, match=r"scale must be one of \['clipscore', 'torchmetrics'\]"):
        clipscore(folder, scale="cosine")


@pytest.mark.parametrize(
    ("width", "plain", "rounded"), [(37, 2, 2), (39, 3, 4), (38, 3, 3), (41, 4, 4), (43, 5, 6)]
)
def test_the_centre_is_transformers_or_torchvision_s(
    folder: str, width: int, plain: int, rounded: int
) -> None:
    """torchvision's margin is int(round((width - crop) / 2.0))."""
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    ramp = torch.linspace(0, 1, width).expand(1, 3, SIDE, width)
    steps = Preprocess.of(processor, folder)
    for given, left in ((steps, plain), (replace(steps, rounds=True), rounded)):
        first = given(ramp)[0, 0, 0, 0] * steps.std[0] + steps.mean[0]
        assert float(first) == pytest.approx(float(ramp[0, 0, 0, left]), abs=1e-5)
