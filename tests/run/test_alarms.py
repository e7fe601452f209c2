"""Signs of exploited rewards: each shows what it is about and nothing else, and is told once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sfgrpo.run import alarms

RNG = np.random.default_rng(0)
COLOURS_PN = RNG.integers(60, 190, (3, 4, 3, 1, 1))
USUAL_PN = (COLOURS_PN + 12 * RNG.standard_normal((3, 4, 3, 16, 16)).cumsum(3)).clip(16, 239)
USUAL_PN = USUAL_PN.astype(np.uint8)
"""Images of different colours whose pixels belong together."""


def garish(x: np.ndarray) -> np.ndarray:
    return np.where(x > x.mean(-3, keepdims=True), 255, 30)


def checkered(x: np.ndarray) -> np.ndarray:
    board = np.indices(x.shape[-2:]).sum(0) % 2
    return x * 0.6 + 100 * board


CHANGES: dict[str, Any] = {
    "diversity": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "saturation": garish,
    "dark_pixels": lambda x: np.where(np.arange(16) < 5, 0, x),
    "high_frequency": checkered,
    "distance_to_start": lambda x: np.where(x > 128, 0, 255),
}


def crossed(images_PN: np.ndarray) -> set[str]:
    first = alarms.signs(USUAL_PN, USUAL_PN)
    now = alarms.signs(images_PN.astype(np.uint8), USUAL_PN)
    assert now.keys() == alarms.ALARMS.keys()
    return {name for name, value in now.items() if alarms.ALARMS[name].crossed(value, first)}


@pytest.mark.parametrize("name", CHANGES)
def test_each_sign_shows_its_own_hack(name: str) -> None:
    assert name in crossed(CHANGES[name](USUAL_PN.astype(float)))


def test_the_first_evaluation_and_small_changes_are_quiet() -> None:
    assert crossed(USUAL_PN) == set()
    assert crossed(USUAL_PN * 0.95 + RNG.uniform(0, 4, USUAL_PN.shape)) == set()


def test_signs_of_known_images() -> None:
    images = np.zeros((1, 2, 3, 4, 4), np.uint8)
    images[0, 1, 0] = 255  # one black, one red
    found = alarms.signs(images, None)
    assert found["diversity"] == pytest.approx(1 / 3**0.5)
    assert found["saturation"] == 0.5
    assert found["dark_pixels"] == 0.5
    assert found["high_frequency"] == 0.0
    assert "distance_to_start" not in found


def test_a_judge_parts_from_a_reward_that_rises() -> None:
    first = {"reward": 0.5, "a": 2.0, "b": 2.0, "zero": 0.0}
    directions = {"a": "higher", "b": "lower", "zero": "higher", "missing": "lower"}
    found = alarms.partings(first, {"reward": 0.6, "a": 1.5, "b": 1.5, "zero": 1.0}, directions)
    assert found == {"judge_a": 0.25, "judge_b": 0.0}
    found = alarms.partings(first, {"reward": 0.6, "a": 2.5, "b": 2.5}, directions)
    assert found == {"judge_a": 0.0, "judge_b": 0.25}
    found = alarms.partings(first, {"reward": 0.4, "a": 1.0, "b": 3.0}, directions)
    assert found == {"judge_a": 0.0, "judge_b": 0.0}


def test_clean_estimates_part_from_what_is_finished() -> None:
    def metrics(*rewards: float, deviation: float = 0.1) -> dict[str, Any]:
        return {"reward_per_state": [*rewards], "reward_std_in_group": deviation}

    apart = metrics(0.5, 0.2, 0.4, deviation=0.1)  # 2 deviations below, at the second state
    rows = [apart, metrics(0.4, 0.5, 0.4)] * alarms.LEAST
    assert alarms.estimates(rows) == pytest.approx({"estimates": 1.5})
    assert alarms.estimates([*rows, *[apart] * alarms.LAST]) == pytest.approx({"estimates": 2.0})
    assert alarms.estimates([apart] * (alarms.LEAST - 1)) == {}
    # Uniform credit scores the last state alone; a group without deviation has no unit.
    assert alarms.estimates([metrics(0.4, 0.4), metrics(0.1, 0.4, deviation=0.0), {}] * 9) == {}
    told = alarms.crossings([row(0)], row(10, estimates=1.6))
    assert told[0].startswith("Clean estimates part from the samples: 1.6 in the evaluation")


def test_a_judge_says_which_way_is_better() -> None:
    @alarms.better(sharpness="higher")
    def judge(*_: object) -> dict[str, float]:
        return {}

    assert vars(judge)["better"] == {"sharpness": "higher"}
    with pytest.raises(ValueError, match="'x' must be 'higher' or 'lower', got 'up'"):
        alarms.better(x="up")  # pyright: ignore[reportArgumentType]


def row(iteration: int, **signs: float) -> dict[str, Any]:
    return {"iteration": iteration, "reward": 0.5, "alarms": signs}


def test_a_crossing_is_told_once() -> None:
    rows = [{"iteration": 0, "reward": 0.4}, row(5, diversity=0.4, judge_a=0.0)]
    assert alarms.crossings(rows, row(10, diversity=0.21, judge_a=0.2)) == []
    now = row(10, diversity=0.19, judge_a=0.3)
    told, judged = alarms.crossings(rows, now)
    assert told.startswith(
        "Diversity: 0.19 in the evaluation after iteration 10, threshold 0.2, at the start 0.4. "
    )
    assert judged.startswith("a parts from the reward: 0.3")
    back = row(15, diversity=0.3, judge_a=0.1)
    assert alarms.crossings([*rows, now, back], row(20, diversity=0.1, judge_a=0.3)) == []
