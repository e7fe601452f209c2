"""Ranks that want different things are refused, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from sfgrpo import config
from sfgrpo.prompts import Prompt, Split
from sfgrpo.run import agreement
from sfgrpo.run.agreement import Refused
from tests.support import ranks

RATE = ("train.learning_rate", "0.001")
STAGE = [("run.seed", "7"), ("deepspeed.zero_stage", "2"), ("checkpoint.every", "3")]


def said(refuse: Callable[[], object]) -> str:
    try:
        refuse()
    except Refused as error:
        return str(error)
    return "fine"


def one_of_two(_: None) -> dict[str, str]:
    """What a rank is told, case by case; rank 1 is the one that differs."""
    rank = dist.get_rank()

    def check(changes: list[tuple[str, str]], **options: object) -> str:
        recipe = config.load("embedded", changes if rank else [])
        return said(lambda: agreement.check(recipe, **options))

    def prompts(*texts: str) -> str:
        found = [Prompt(text, {"seed": 1}) for text in texts]
        return said(lambda: agreement.check_prompts(Split(train=found, evaluation=found[:1])))

    return {
        "same": check([]),
        "another folder": check([("run.output_dir", "/elsewhere")]),
        "rate": check([RATE]),
        "stage": check(STAGE, fresh=False),
        "fresh": check([], fresh=bool(rank)),
        "an option less": check([], **({} if rank else {"fresh": False})),
        "many": check([(f"eval.{k}", "7") for k in ("every", "num_steps", "prompts")] + STAGE),
        "prompts": prompts("a", "b"),
        "other prompts": prompts("a", "c" if rank else "b"),
    }


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What both ranks are told, which is the same."""
    one, two = ranks.run("tests.run.test_agreement:one_of_two", 2, None)
    assert one == two
    return one


@pytest.mark.slow
@pytest.mark.parametrize("case", ["same", "another folder", "prompts"])
def test_ranks_that_agree_go_on(told: dict[str, str], case: str) -> None:
    assert told[case] == "fine"


EXPECTED = {
    "rate": ["rank 1 has train.learning_rate 0.001, rank 0 has 0.0005"],
    "stage": [
        "rank 1 has run.seed 7, rank 0 has 0",
        "rank 1 has deepspeed.zero_stage 2, rank 0 has 0",
        "rank 1 has checkpoint.every 3, rank 0 has 10",
    ],
    "fresh": ["rank 1 has --fresh True, rank 0 has False"],
    "an option less": ["rank 1 has --fresh none, rank 0 has False"],
    "many": ["and 1 more. Give every rank the same"],
    "other prompts": ["rank 1 has the prompts for training '2 with hash ", ", rank 0 has '2 with"],
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_differs_is_named(told: dict[str, str], case: str) -> None:
    for part in EXPECTED[case]:
        assert part in told[case]
    assert "\n" not in told[case]
