"""Rewards: known answers, density, mixing, and messages that name what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sfgrpo import rewards
from sfgrpo.embedded import data
from sfgrpo.rewards import colour, ocr


@pytest.fixture(scope="module")
def real() -> data.Batch:
    """Real digits the generator never saw."""
    generator = torch.Generator().manual_seed(1)
    return data.sample(100, split=data.JUDGE_DIGITS, generator=generator)


@pytest.fixture(scope="module")
def reader() -> ocr.OcrReward:
    return ocr.build(threads=1)


def score(reward: rewards.Reward, batch: data.Batch, images: Tensor | None = None) -> Tensor:
    shown = batch.images if images is None else images
    return reward(shown, [r["prompt"] for r in batch.records], batch.records)


def test_ocr_reads_real_digits(real: data.Batch, reader: ocr.OcrReward) -> None:
    scores = score(reader, real)
    assert scores.shape == (100,)
    assert scores.dtype == torch.float32
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.mean() > 0.8  # measured: 0.88


def test_ocr_does_not_see_other_digits_or_empty_fields(
    real: data.Batch, reader: ocr.OcrReward
) -> None:
    others = [{**r, "text": str((int(r["text"]) + 1) % 10)} for r in real.records]
    assert reader(real.images, [""] * 100, others).mean() < 0.1
    plain = real.images[:, :, :1, :1].expand(-1, -1, 32, 32)
    assert score(reader, real, plain).mean() < 0.05


def test_ocr_is_dense(real: data.Batch, reader: ocr.OcrReward) -> None:
    """Between a plain field and a digit there are scores between theirs, rising on average."""
    plain = real.images[:, :, :1, :1].expand(-1, -1, 32, 32)
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
    means = []
    for clean in (0.2, 0.4, 0.7, 1.0):
        shown = plain + clean * (real.images - plain) + (1 - clean) * 0.3 * noise
        means.append(float(score(reader, real, shown.clamp(0, 1)).mean()))
    assert means == sorted(means)
    assert means[-1] - means[0] > 0.3
    scores = score(reader, real)
    assert ((scores > 0.05) & (scores < 0.95)).float().mean() > 0.05


def test_ocr_score_of_an_image_does_not_depend_on_its_batch(
    real: data.Batch, reader: ocr.OcrReward
) -> None:
    small = ocr.build(threads=1, batch=7)
    # Probabilities of a softmax over 18,710 classes, in float32 with another blocking of sums.
    torch.testing.assert_close(score(small, real), score(reader, real), atol=1e-4, rtol=0)


def test_ocr_leaves_rapidocr_unimported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rapidocr"]:
        monkeypatch.delitem(sys.modules, name)  # the reward of whole lines imports it
    ocr.build(threads=1)
    assert ocr.model_path().suffix == ".onnx"
    assert "rapidocr" not in sys.modules


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, KeyError, "text"),
        ({"text": "42"}, ValueError, "'42'"),
        ({"text": 4}, ValueError, "got 4"),
    ],
)
def test_ocr_names_metadata_it_cannot_use(
    reader: ocr.OcrReward, metadata: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader(torch.zeros(1, 3, 32, 32), [""], [metadata])


def test_colour_scores_real_images_highest(real: data.Batch) -> None:
    reward = colour.build()
    exact = score(reward, real)
    assert exact.min() > 0.9
    assert exact.max() <= 1
    exchanged = [
        {**r, "foreground": r["background"], "background": r["foreground"]} for r in real.records
    ]
    assert reward(real.images, [""] * 100, exchanged).max() < 0.2
    wrong = [*real.records[1:], real.records[0]]
    assert reward(real.images, [""] * 100, wrong).mean() < 0.3
    plain = real.images[:, :, :1, :1].expand(-1, -1, 32, 32)
    assert score(reward, real, plain).max() < 0.1


def test_colour_falls_smoothly_with_the_distance_of_the_colour(real: data.Batch) -> None:
    grey = torch.full_like(real.images, 0.5)
    means = [
        float(score(colour.build(), real, torch.lerp(real.images, grey, w)).mean())
        for w in (0.0, 0.1, 0.2, 0.4, 0.8)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[1] < 0.5


def test_colour_names_the_words_it_knows() -> None:
    with pytest.raises(KeyError, match=r"mauve.*dark blue"):
        colour.build()(
            torch.zeros(1, 3, 8, 8), [""], [{"foreground": "mauve", "background": "red"}]
        )


class Brightness:
    """A reward of the user's own."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[rewards.Metadata]
    ) -> Tensor:
        return self.factor * images.mean((1, 2, 3))


class Short:
    """Returns one score too few."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[rewards.Metadata]
    ) -> Tensor:
        return torch.zeros(len(images) - 1)


def test_mixture_is_the_weighted_sum(real: data.Batch, reader: ocr.OcrReward) -> None:
    mixture = rewards.load({"ocr": 0.8, "colour": 0.2}, {"ocr": {"threads": 1}})
    total, parts = mixture(real.images, [""] * 100, real.records)
    assert set(parts) == {"ocr", "colour"}
    torch.testing.assert_close(total, 0.8 * parts["ocr"] + 0.2 * parts["colour"])
    torch.testing.assert_close(parts["ocr"], score(reader, real))


def test_rewards_are_found_by_file_and_by_dotted_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"ocr", "colour"} <= set(rewards.available())
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    mixture = rewards.load({"my_rewards:Brightness": 2.0}, {"my_rewards:Brightness": {"factor": 3}})
    total, _ = mixture(torch.ones(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert total.tolist() == [6.0, 6.0]


def test_mixture_names_what_went_wrong() -> None:
    images = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="unknown reward 'color'; did you mean 'colour'"):
        rewards.load({"color": 1.0})
    with pytest.raises(ValueError, match="did you mean 'colour'"):
        rewards.load({"colour": 1.0}, {"color": {}})
    with pytest.raises(ValueError, match="at least one"):
        rewards.load({})
    short = rewards.Mixture({"short": Short()}, {"short": 1.0})
    with pytest.raises(ValueError, match=r"'short' returned shape \(1,\) for 2"):
        short(images, ["a", "b"], [{}, {}])
    nan = rewards.Mixture({"bright": Brightness(float("nan"))}, {"bright": 1.0})
    with pytest.raises(ValueError, match="'bright' is nan for prompt 'a'"):
        nan(images, ["a", "b"], [{}, {}])
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        nan(images, ["a"], [{}, {}])
