"""The reward of a whole line: known probabilities, real handwriting, messages."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from sfgrpo.embedded import data
from sfgrpo.rewards import line
from sfgrpo.rewards.base import Metadata


@pytest.fixture(scope="module")
def reader() -> line.LineReward:
    return line.build(threads=1, batch=16)


Numbers = tuple[Tensor, list[Metadata]]


@pytest.fixture(scope="module")
def real() -> Numbers:
    """Numbers of three real digits, [24, 3, 32, 72], in one pair of colours; not a multiple of the
    reader's batch."""
    generator = torch.Generator().manual_seed(1)
    masks, labels = data.digits(data.JUDGE_DIGITS)
    ink = data.enlarge(masks[:72], generator).unflatten(0, (24, 3))[..., 4:-4]
    records = [data.record(0, "red", "white")] * 24
    images = data.recolour(torch.cat(ink.unbind(1), 3), records)
    texts = ["".join(map(str, row)) for row in labels[:72].reshape(24, 3).tolist()]
    return images, [{"text": text} for text in texts]


@pytest.mark.parametrize("target", [[1], [1, 2], [2, 2], [1, 2, 1]])
def test_probability_is_that_of_all_alignments(target: list[int]) -> None:
    """Against the sum over every path that collapses to the target."""
    positions = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)).softmax(2)
    expected = torch.zeros(2)
    for path in product(range(3), repeat=5):
        merged = [c for i, c in enumerate(path) if c and (i == 0 or c != path[i - 1])]
        if merged == target:
            expected += torch.stack([positions[:, i, c] for i, c in enumerate(path)]).prod(0)
    found = line.probability(positions, [target, target])
    torch.testing.assert_close(found, expected ** (1 / len(target)))


def test_a_line_that_does_not_fit_scores_zero() -> None:
    assert line.probability(torch.full((1, 2, 3), 1 / 3), [[1, 1]]).tolist() == [0]


def test_it_reads_real_numbers_and_no_others(real: Numbers, reader: line.LineReward) -> None:
    images, asked = real
    prompts = [""] * 24
    scores = reader(images, prompts, asked)
    assert scores.shape == (24,)
    assert scores.dtype == torch.float32
    assert scores.max() <= 1
    assert scores.mean() > 0.85  # measured: 0.95
    longer = [{"text": entry["text"] + "0"} for entry in asked]
    others = [{"text": f"{(int(entry['text']) + 111) % 1000:03d}"} for entry in asked]
    assert reader(images, prompts, others).mean() < 0.05
    assert reader(images, prompts, longer).mean() < 0.5 * scores.mean()
    plain = images[:, :, :1, :1].expand_as(images)
    assert reader(plain, prompts, asked).mean() < 0.05
    assert reader(images[:0], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, KeyError, "the line to be read"),
        ({"text": ""}, ValueError, "got ''"),
        ({"text": 472}, ValueError, "got 472"),
        ({"text": "4\u05d0"}, ValueError, "characters of the recogniser's set"),
    ],
)
def test_it_names_metadata_it_cannot_use(
    reader: line.LineReward, metadata: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reader.check([""], [metadata])
