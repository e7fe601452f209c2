"""A call that fails is made again, and what becomes of it if it fails for good."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfgrpo import rewards
from sfgrpo.rewards import Calls, Mixture, RewardError
from sfgrpo.rewards._calls import watched
from sfgrpo.rewards.base import Unscored

TEXTS = ["a", "a", "b", "c"]
SAMPLES = torch.arange(4.0)[:, None]


class Failing:
    """Scores samples by their value, except for the answers that come before."""

    def __init__(self, *answers: Callable[[int], Any]) -> None:
        self.answers, self.calls = list(answers), list[int]()

    def __call__(self, samples: Tensor, texts: list[str], metadata: list[Any]) -> Any:
        self.calls.append(len(samples))
        found = self.answers.pop(0)(len(samples)) if self.answers else samples[:, 0].clone()
        samples.zero_()
        return found


def raises(_: int) -> Any:
    raise OSError("no connection")


def exits(_: int) -> Any:
    sys.exit(0)


def scored(reward: Any, **options: Any) -> tuple[Tensor, Calls]:
    calls = Calls(**options)
    mixed = Mixture({"r": reward}, {"r": 1.0}, calls=calls)
    total, _ = mixed(SAMPLES, TEXTS, [{} for _ in TEXTS], finite=False)
    return total, calls


BAD = [
    raises, exits, lambda count: torch.zeros(count + 1), lambda count: "none",
    lambda count: [float("nan")] * count, lambda count: torch.zeros(count, dtype=torch.complex64),
]  # fmt: skip
NAMES = ["raises", "exits", "wrong length", "no numbers", "nan", "complex"]


@pytest.mark.parametrize("bad", BAD, ids=NAMES)
def test_a_call_is_made_again_on_the_same_samples(bad: Callable[[int], Any]) -> None:
    reward = Failing(bad, bad)
    total, calls = scored(reward, retries=2)
    assert total.tolist() == [0, 1, 2, 3]
    assert (reward.calls, calls.retried) == ([4, 4, 4], 2)


@pytest.mark.parametrize("bad", BAD[:4] + BAD[5:], ids=NAMES[:4] + NAMES[5:])
def test_after_the_last_attempt_it_is_told(bad: Callable[[int], Any]) -> None:
    with pytest.raises(RewardError, match="reward 'r'"):
        scored(Failing(*[bad] * 20), retries=1)


def test_scores_that_stay_not_finite_are_passed_on() -> None:
    total, calls = scored(Failing(BAD[4], BAD[4]), retries=1, policy="stop")
    assert total.isnan().all()
    assert not calls.failures


def test_an_attempt_draws_what_the_failed_one_drew() -> None:
    def draws(samples: Tensor, *_: Any) -> Tensor:
        numbers = torch.rand(len(samples)) + random.random() + float(np.random.rand())
        if failing and random.random() < 2:
            failing.pop()
            raise OSError
        return numbers

    def run() -> list[float]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return [scored(draws, retries=3)[0].tolist() for _ in range(2)][-1]

    failing = list[int]()
    expected = run()
    failing = [1, 2, 3]
    assert run() == expected


def test_without_a_group_the_others_keep_their_scores() -> None:
    def picky(samples: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        if "b" in texts:
            raise OSError("not this one")
        return samples[:, 0]

    total, calls = scored(picky, policy="drop_group", retries=1)
    assert total[[0, 1, 3]].tolist() == [0, 1, 3]
    assert total[2].isnan()
    assert [failure.text for failure in calls.failures] == ["b"]
    assert "reward 'r' failed on prompt 'b'" in calls.failures[0].message


def test_what_a_reward_scored_in_part_is_kept() -> None:
    def partly(samples: Tensor, texts: list[str], metadata: list[Any]) -> Tensor:
        raise Unscored("http://x: status 500", torch.tensor([0.0, 1.0, float("nan"), 3.0]))

    total, calls = scored(partly, policy="drop_group", retries=3)
    assert total.isnan().tolist() == [False, False, True, False]
    (failure,) = calls.failures
    assert (failure.text, failure.message) == ("b", "reward 'r': http://x: status 500")
    assert calls.retried == 0  # it has tried again itself
    with pytest.raises(RewardError, match="reward 'r': http://x: status 500"):
        scored(partly)


def test_a_run_that_stops_asks_no_more() -> None:
    reward: Any = Failing(*[raises] * 20)
    calls = Calls(policy="stop")
    mixed = Mixture({"r": reward}, {"r": 1.0}, calls=calls)
    for _ in range(3):
        total, _ = mixed(SAMPLES, TEXTS, [{} for _ in TEXTS], finite=False)
        assert total.isnan().all()
    assert reward.calls == [4, 1]  # the second finds out that it is prompt 'a'
    assert {failure.text for failure in calls.failures} == {"a", "b", "c"}


def test_a_call_that_does_not_return_is_told() -> None:
    told, free = list[str](), threading.Event()

    def end(reason: str) -> None:
        told.append(reason)
        free.set()

    def hangs(samples: Tensor, *_: Any) -> Tensor:
        free.wait()
        return samples[:, 0]

    scored(hangs, timeout=0.05, end=end)
    message = "reward 'r' has not returned for 0.05 s (reward_timeout) on 4 samples, the first of"
    assert told[0].startswith(f"{message} prompt 'a'; it is at ")
    assert len(told) == 1
    vars(hangs)["bounds_time"] = True
    scored(hangs, timeout=1e-9, end=end)
    scored(lambda samples, *_: samples[:, 0], timeout=5, end=end)
    assert len(told) == 1


HOLDS_THE_LOCK = """
import re
from sfgrpo.rewards import _calls

_calls.GRACE = 0.2
with _calls.watched(0.1, print, "late"):
    re.match("(a+)+$", "a" * 60 + "b")
"""


@pytest.mark.slow
def test_a_call_that_never_lets_python_run_ends_the_process() -> None:
    """C code that holds the interpreter's lock: no thread of ours runs then."""
    before = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert time.monotonic() - before < 90


def test_a_call_in_time_leaves_nothing_behind() -> None:
    told = list[str]()
    with watched(0.05, told.append, "late"):
        pass
    time.sleep(0.1)
    assert told == []


def test_rewards_raise_by_default() -> None:
    with pytest.raises(RewardError, match=r"'r' failed on prompt 'a': .*OSError: no connection"):
        scored(Failing(*[raises] * 9))
    assert rewards.load({"colour": 1.0}).calls.policy == "raise"
