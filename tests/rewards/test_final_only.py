"""Rewards that score final images alone, among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import rewards


def mean(images: Tensor, texts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 5, 3, 4, 4), (4, 7)])
def test_a_reward_of_final_images_sees_no_other(shape: tuple[int, ...]) -> None:
    """The others score 0 by it, and a broken one of them is no matter of its."""
    seen = []

    def last(images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        seen.append((len(images), set(texts)))
        return mean(images, texts, metadata)

    samples, texts = (
        torch.arange(4.0).view(4, *[1] * (len(shape) - 1)).expand(shape).clone(),
        "abcd",
    )
    samples[0].view(-1)[0] = torch.nan
    built: Any = {"mean": mean, "last": last}
    both = rewards.Mixture(built, {"mean": 1.0, "last": 10.0}, frames=2, final_only={"last"})
    asked = (samples, list(texts), [{}] * 4)
    final = torch.tensor([False, True, False, True])
    total, parts = both(*asked, finite=False, final=final)
    assert seen == [(4 if len(shape) == 5 else 2, {"b", "d"})]
    assert parts["last"].tolist() == [0, 1, 0, 3]
    assert total[1:].tolist() == [11, 2, 33]
    assert torch.isnan(total[0])
    both(*asked, finite=False, final=torch.zeros(4, dtype=torch.bool))
    assert len(seen) == 1
    _, whole = both(*asked, finite=False)
    assert whole["last"][1:].tolist() == [1, 2, 3]
    assert torch.isnan(whole["last"][0])


class Late:
    final_only = True

    def __call__(self, images: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        return mean(images, texts, metadata)


def build_late() -> Late:
    return Late()


@rewards.final_only
def build_later() -> Late:
    return Late()


def test_who_scores_final_images_alone_is_known_before_it_is_built() -> None:
    late, later, unbuilt = (f"{__name__}:{name}" for name in ("Late", "build_later", "build_late"))
    assert rewards.of_final_images(["colour", late, later, unbuilt]) == {late, later}
    assert rewards.of_final_images(["colour", "ocr"], ["ocr"]) == {"ocr"}
    both = rewards.load({late: 1.0, later: 1.0, "colour": 1.0}, final_only=["colour"])
    assert both.final_only == {late, later, "colour"}
    with pytest.raises(
        ValueError, match=r":build_late': what it returns says final_only.*decorate"
    ):
        rewards.load({unbuilt: 1.0})
    assert rewards.load({unbuilt: 1.0}, final_only=[unbuilt]).final_only == {unbuilt}
