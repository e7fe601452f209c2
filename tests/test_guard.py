"""Numbers that are not finite, rollouts that training does not recognise: named, and stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfgrpo import config
from sfgrpo import trainer as trainer_module
from sfgrpo.guard import OVERFLOWS, Disagreement, Guard, NonFinite
from sfgrpo.rollout import Trajectories
from sfgrpo.run import records
from sfgrpo.statistics import Drift, reward_statistics
from sfgrpo.trainer import Trainer
from tests.support.rewards import Patchy

Make = Callable[..., config.Recipe]
PATCHY = "{'tests.support.rewards:Redness': 1, 'tests.support.rewards:Patchy': 1}"


@pytest.fixture(autouse=True)
def _patchy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patchy, "spoilt", None)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.engine.trainable.values()]


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def test_a_reward_that_is_not_finite_is_named(recipe: Make, tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path, reward=PATCHY, run__iterations="1"))
    spoilt = trainer.draw()[1].text
    trainer.evaluate()
    trainer.progress.state.evaluated, Patchy.spoilt = 0, spoilt
    with pytest.raises(
        NonFinite, match=rf"'tests.support.rewards:Patchy' is inf for prompt '{spoilt}'"
    ):
        trainer.train()
    assert not records.read(tmp_path / "metrics.jsonl")


def test_a_group_can_be_dropped(recipe: Make, tmp_path: Path) -> None:
    """Its advantages are 0, the statistics are those of the others, and it is counted."""
    given = recipe(
        tmp_path, reward=PATCHY, run__iterations="1", train__on_nonfinite="drop_group",
        eval="{every: 9, prompts: 5, images_per_prompt: 2, num_steps: 2, judges: []}",
    )  # fmt: skip
    trainer = Trainer(given)
    Patchy.spoilt = trainer.draw()[0].text
    with pytest.warns(
        UserWarning, match="1 of 2 groups dropped: reward 'tests.support.rewards:Patchy'"
    ):
        trainer.train()
    (row,) = records.read(tmp_path / "metrics.jsonl")
    assert row["dropped_groups"] == 1
    assert all(torch.tensor(value).isfinite().all() for value in row.values())
    assert [row["dropped_images"] for row in records.read(tmp_path / "eval.jsonl")] == [2, 2]
    rewards = torch.rand(3, 4, 5)
    rewards[1, 2, 3] = float("nan")
    schedule = trainer.layout.schedule(0)
    advantages = trainer.credit(rewards, schedule)
    assert not advantages[1].any()
    assert torch.equal(advantages[::2], trainer.credit(rewards[::2], schedule))
    without = reward_statistics(rewards[::2], {})
    assert reward_statistics(rewards, {}) == {**without, "dropped_groups": 1}
    with pytest.raises(NonFinite, match="no group is left"):
        trainer.guard.rewards(torch.full((2, 4, 5), torch.nan), dict)


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_gradient_that_is_not_finite_leaves_the_weights(
    recipe: Make, tmp_path: Path, stage: str
) -> None:
    trainer = Trainer(recipe(tmp_path, run__iterations="1", deepspeed__zero_stage=stage))
    before = weights(trainer)
    name, parameter = next(iter(trainer.engine.trainable.items()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFinite, match=r"gradient is not finite in iteration 0.*prompt 'a "):
        trainer.train()
    assert same(weights(trainer), before), name
    assert not trainer.progress.checkpoints.saved()


def spoil(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rollouts report other log-densities than they had."""
    sample = trainer_module.sample

    def spoilt(*args: object, **keys: object) -> Trajectories:
        made = sample(*args, **keys)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(made, logp_MT=change(made.logp_MT))

    monkeypatch.setattr(trainer_module, "sample", spoilt)


def test_a_loss_that_is_not_finite_names_its_rows(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(tmp_path, run__iterations="1"))
    trainer.progress.state.evaluated, before = 0, weights(trainer)
    at = torch.zeros(8, 4, dtype=torch.bool)
    at[5, 1] = True
    spoil(lambda logp: logp.masked_fill(at, -torch.inf), monkeypatch)
    second = trainer.draw()[1].text
    with pytest.raises(NonFinite, match=f"'{second}', step 1, ratio inf, logp .*sampling -inf"):
        trainer.train()
    assert same(weights(trainer), before)


@pytest.mark.slow
def test_rollout_and_training_must_agree(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step off is a warning, all of them off stop the run before its first update."""
    trainer = Trainer(recipe(tmp_path, run__iterations="2"))
    trainer.progress.state.evaluated, before = 0, weights(trainer)
    step = torch.tensor([0.0, 0.0, 0.006, 0.0])
    spoil(lambda logp: logp + step, monkeypatch)
    with pytest.warns(UserWarning, match=r"disagree at a step: .*most at step 2 \(0.006\)"):
        trainer.train()
    drift = records.read(tmp_path / "metrics.jsonl")[0]["logp_drift_per_step"]
    assert drift == pytest.approx(step.tolist(), abs=1e-5)
    spoil(lambda logp: logp + 0.02, monkeypatch)
    for budget, stops in (("null", True), ("1.0", False)):
        folder = tmp_path / budget
        trainer = Trainer(recipe(folder, run__iterations="1", train__drift_budget=budget))
        before = weights(trainer)
        if stops:
            with pytest.raises(Disagreement, match=r"0.02\d* on average .* budget is 0.005"):
                trainer.train()
            assert same(weights(trainer), before)
        else:
            trainer.train()


def test_a_few_overflows_in_fp16_are_a_search_many_are_not() -> None:
    guard = Guard(config.load("embedded", [("model.dtype", "fp16")]))
    guard._rows = [torch.ones(1, 7)]
    guard.texts = ["a", "b"]
    for _ in range(OVERFLOWS - 1):
        guard.norm(1.0, taken=False)
        guard._rows = [torch.ones(1, 7)]
    with pytest.raises(NonFinite, match=f"{OVERFLOWS} times in a row"):
        guard.norm(1.0, taken=False)
    guard.drift(Drift(1e-7, 1e-6, [0.0, 1e-7]))
