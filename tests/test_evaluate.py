"""What a judge may return, and that it cannot spoil what is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfgrpo import evaluate
from sfgrpo.evaluate import Evaluation
from sfgrpo.names import JUDGE
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import RewardError
from sfgrpo.rollout import VelocityField
from sfgrpo.run import alarms
from tests.support.toy import PointBackbone

ASKED = [Prompt("-1", {"text": "A"}), Prompt("0.5", {"text": "B"})]


def run(*judges: Callable[..., Any]) -> Evaluation:
    """Two images of each prompt, whose reward is 1."""
    backbone = PointBackbone()
    field = VelocityField(
        backbone=backbone, network=backbone.transformer, unconditional=None, guidance=1.0,
        conditioning=backbone.encode([p.text for p in ASKED]), batch_size=3,
    )  # fmt: skip
    return evaluate.evaluate(
        field, ASKED, lambda images, *_: {"reward": torch.ones(len(images))}, judges,
        seed=0, num_steps=2, images_per_prompt=2, latent_shape=(3, 4, 4),
    )  # fmt: skip


def test_numbers_of_any_kind_are_logged_as_numbers() -> None:
    found = run(lambda *_: {"a": torch.tensor(0.5), "b": np.float32(2)}, lambda *_: {"c": 3})
    assert found.numbers == {"reward": 1.0, "a": 0.5, "b": 2.0, "c": 3.0}
    assert {type(value) for value in found.numbers.values()} == {float}


def test_scores_of_prompts_are_of_the_images_that_have_one() -> None:
    scores = {
        "reward": torch.tensor([1.0, 2.0, torch.nan, 3.0, torch.inf, torch.nan]),
        "part": torch.tensor([1.0, 3.0, 9.0, 5.0, 1.0, 1.0]),
    }
    found = evaluate._per_prompt(scores, 2)
    assert found == {"reward": [1.5, 3.0, None], "part": [2.0, 5.0, None]}


def test_what_a_judge_cannot_say_is_left_out() -> None:
    with pytest.warns(UserWarning, match=r"eval.judges: '.*' returned nan for 'a': left out"):
        found = run(lambda *_: {"a": torch.nan, "b": 1})
    assert found.numbers == {"reward": 1.0, "b": 1.0}


def test_what_judges_say_of_their_numbers_is_kept() -> None:
    @alarms.better(a="higher")
    def judge(*_: object) -> dict[str, float]:
        return {"a": 1.0}

    found = run(judge, lambda *_: {"b": 1})
    assert found.better == {"a": "higher"}
    assert found.per_prompt == {"reward": [1.0, 1.0]}


def test_a_judge_may_overwrite_what_it_is_given() -> None:
    def ruin(images: Tensor, metadata: list[Any]) -> dict[str, float]:
        images.zero_()
        metadata[0].clear()
        return {}

    def look(images: Tensor, metadata: list[Any]) -> dict[str, float]:
        return {"sum": float(images.sum()), "texts": len([m["text"] for m in metadata])}

    usual = run(look)
    ruined = run(ruin, look)
    assert ruined.numbers == usual.numbers
    assert usual.numbers["sum"] > 0
    assert torch.equal(ruined.samples_PN, usual.samples_PN)
    assert ASKED[0].metadata == {"text": "A"}


def leave(images: Tensor, metadata: list[Any]) -> dict[str, float]:
    sys.exit(0)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda *_: None, "returned NoneType, expected named numbers"),
        (lambda *_: 0.5, "returned float, expected named numbers"),
        (lambda *_: {"a": "high"}, "returned str for 'a', expected one number"),
        (lambda *_: {"a": torch.ones(2)}, "returned Tensor for 'a', expected one number"),
        (lambda *_: {"iteration": 1}, "returned 'iteration', a name that is taken"),
        (lambda *_: {"reward": 1}, "returned 'reward', a name that is taken"),
        (lambda *_: {"alarms": 1}, "returned 'alarms', a name that is taken"),
        (lambda *_: {}["a"], rf"eval.judges: .* failed: {__file__}, line \d+: KeyError: 'a'"),
        (leave, r"eval.judges: '.*test_evaluate:leave' called sys.exit\(0\)"),
    ],
)
def test_what_a_judge_may_not_do_is_named(judge: Callable[..., Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        run(judge)


def test_a_judge_with_options_keeps_its_name() -> None:
    """What binds the options stands between, and is not what the message is about."""
    judge = JUDGE.bind(f"{__name__}:sized", {"size": 3})
    assert judge(torch.ones(1), []) == {"size": 3}
    assert (judge.__module__, judge.__qualname__) == (__name__, "sized")


def sized(samples: Tensor, metadata: Any, *, size: int) -> dict[str, int]:
    return {"size": size}
