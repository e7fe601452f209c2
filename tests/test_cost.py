"""What is expected of an iteration is what it counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sfgrpo import config, cost, solvers
from sfgrpo.run import records
from sfgrpo.run.clock import Clock
from sfgrpo.run.stopping import Signals
from sfgrpo.trainer import Trainer
from tests.support.rewards import Blueness

Make = Callable[..., config.Recipe]

BASE = {
    "credit__solver": "by_level",
    "credit__solver_options": "{}",
    "sample__batch_size": "64",
    "train__micro_batch_size": "64",
}
BOTH = "{'tests.support.rewards:Redness': 1, 'tests.support.rewards:Blueness': 0.01}"
ALONE = "{'tests.support.rewards:Blueness': 1}"
CASES = {
    "by level": {},
    "euler, no reference": {"credit__solver": "euler", "train__beta": "0"},
    "uniform": {"credit__rule": "uniform", "lora": "null"},
    "blocks of two": {"credit__stride": "2", "sample__sampler": "cps"},
    "guidance, two updates": {"sample__guidance_scale": "3", "train__updates_per_iteration": "2"},
    "the sampler's density": {
        "train__updates_per_iteration": "2", "train__old_logp": "sampling", "lora": "null",
        "train__beta": "0",
    },
    "statistics of all steps": {"credit__statistics": "all"},
    "moving window": {
        "sample__window": "{steps: 1, schedule: progressive, interval: 1, continuation: steps}",
    },
    "random window": {
        "sample__window": "{steps: 2, continuation: steps}", "sample__num_steps": "6",
    },
    "solver behind a window": {"sample__window": "{steps: 2}", "sample__num_steps": "6"},
    "final images alone beside another": {"reward": BOTH},
    "final images alone, in a window": {
        "reward": BOTH, "reward_final_only": "['tests.support.rewards:Redness']",
        "sample__window": "{steps: 2}", "sample__num_steps": "6",
    },
    "uniform, moving": {
        "sample__window": "{steps: 2, schedule: progressive, interval: 1, range: [3, 6]}",
        "sample__num_steps": "8", "credit__rule": "uniform",
    },
}  # fmt: skip


def foretold(trainer: Trainer, world: int = 1, iteration: int = 0) -> dict[str, int]:
    sigmas = trainer.backbone.sigmas(trainer.recipe.sample.num_steps, trainer.latent_shape)
    return cost.expected(trainer.recipe, sigmas, world=world, iteration=iteration).counts()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_an_iteration_takes_what_was_expected(
    recipe: Make, tmp_path: Path, changes: dict[str, str]
) -> None:
    trainer = Trainer(recipe(tmp_path, **{**BASE, **changes}))
    for iteration in (0, 1) if "sample__window" in changes else (0,):
        trainer.progress.state.iteration = iteration
        found = trainer.iterate(Clock(), Signals())["cost"]
        assert found == foretold(trainer, iteration=iteration)


@pytest.mark.parametrize("rule", ["stepwise", "uniform"])
def test_a_reward_of_final_images_is_shown_no_other(
    recipe: Make, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are counted; and where no reward sees another, none is estimated or decoded."""
    monkeypatch.setattr(Blueness, "shown", 0)
    base = {**BASE, "credit__rule": rule}
    trainer = Trainer(recipe(tmp_path / "both", **base, reward=BOTH))
    found = trainer.iterate(Clock(), Signals())["cost"]
    assert found["scored_final"] == Blueness.shown == 8
    assert (found["scored"] > 8) == (rule == "stepwise")
    alone = foretold(Trainer(recipe(tmp_path / "one", **base, reward=ALONE)))
    assert alone["scored"] == alone["scored_final"] == alone["decoded"] == 8
    same = {"credit__rule": "uniform", "reward": ALONE}
    assert alone == foretold(Trainer(recipe(tmp_path / "same", **{**base, **same})))


def test_evaluations_between_iterations_are_not_counted(recipe: Make, tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path, **BASE, run__iterations="2"))
    trainer.train()
    rows = records.read(tmp_path / "metrics.jsonl")
    assert [row["cost"] for row in rows] == [foretold(trainer)] * 2


def test_a_group_that_spans_ranks_begins_on_each(recipe: Make, tmp_path: Path) -> None:
    """Of three groups of two the second is on both ranks: its first two steps, of which the second
    is the first with noise, and the image of the state between them. That runs count so is seen
    beside what else is compared over ranks (tests/engine/test_zero.py)."""
    sizes = {"sample__prompts_per_iteration": "3", "sample__group_size": "2"}
    trainer = Trainer(recipe(tmp_path, **{**BASE, **sizes, "credit__solver": "tweedie"}))
    one, both = foretold(trainer), foretold(trainer, world=2)
    assert {kind: both[kind] - one[kind] for kind in one} == {
        "velocity": 2, "gradient": 0, "decoded": 1, "scored": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "options", "asked"),
    [
        ("tweedie", {}, 0),
        ("euler", {"substeps": 1}, 0),
        ("euler", {"substeps": 5}, 4),
        ("midpoint", {}, 1),
        ("third_order", {}, 2),
        ("exact", {"substeps": 4}, 11),
    ],
)
def test_evaluations_of_a_solver(solver: str, options: dict[str, int], asked: int) -> None:
    (method,) = solvers.methods(solver, options, {0: 0.8}).values()
    assert cost.further_evaluations(method) == asked
