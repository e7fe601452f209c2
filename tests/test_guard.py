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
from sfgrpo.credit import Rewards
from sfgrpo.drift import Disagreement, Drift
from sfgrpo.guard import OVERFLOWS, Guard, NonFinite
from sfgrpo.rollout import Trajectories
from sfgrpo.run import records
from sfgrpo.statistics import reward_statistics
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
    assert row.pop("cost").keys() == {"velocity", "gradient", "decoded", "scored"}
    assert all(torch.tensor(value).isfinite().all() for value in row.values())
    assert [row["dropped_images"] for row in records.read(tmp_path / "eval.jsonl")] == [2, 2]
    spoilt = torch.rand(3, 4, 5)
    spoilt[1, 2, 3] = float("nan")
    rewards, others = Rewards.one(spoilt), Rewards.one(spoilt[::2])
    schedule = trainer.layout.schedule(0)
    advantages = trainer.credit(rewards, schedule)
    assert not advantages[1].any()
    assert torch.equal(advantages[::2], trainer.credit(others, schedule))
    assert reward_statistics(rewards) == {**reward_statistics(others), "dropped_groups": 1}
    with pytest.raises(NonFinite, match="no group is left"):
        trainer.guard.rewards(Rewards.one(torch.full((2, 4, 5), torch.nan)))


def test_a_network_that_is_not_finite_is_not_told_as_the_reward(
    recipe: Make, tmp_path: Path
) -> None:
    """Neither by the first evaluation nor, if that came before, by the first iteration."""
    trainer = Trainer(recipe(tmp_path, run__iterations="1"))
    for name, weight in trainer.engine.network.named_parameters():
        if name.endswith("proj_out.weight"):
            weight.data.fill_(torch.nan)
    for told in ("evaluation after iteration 0", "in iteration 0"):
        with pytest.raises(NonFinite, match=f"reward '.*' is nan .*{told}: the sample itself"):
            trainer.train()
        trainer.progress.state.evaluated = 0


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
    with pytest.raises(NonFinite, match=f"'{second}', step 1, ratio 1, logp .*sampling -inf"):
        trainer.train()
    assert same(weights(trainer), before)


BUDGET = [float("inf"), 0.001, 0.004, 0.2]
"""Of a noise-free step and three noisy ones."""


def drifted(*per_step: float) -> Drift:
    return Drift(sum(per_step) / len(per_step), max(per_step), list(per_step))


def test_one_step_beyond_its_budget_is_a_warning_given_once() -> None:
    guard = Guard(config.load("embedded"))
    with pytest.warns(UserWarning, match=r"disagree at a step: .* 0.002 at step 1, .*ns 0.001"):
        guard.drift(drifted(0, 0.002, 0.0001, 0.01), BUDGET)
    guard.drift(drifted(0, 0.002, 0.0001, 0.01), BUDGET)


def test_all_steps_beyond_their_budgets_stop_the_run() -> None:
    guard = Guard(config.load("embedded"))
    with pytest.raises(Disagreement, match="no dropout, the same guidance and weights"):
        guard.drift(drifted(0, 0.0011, 0.0041, 0.21), BUDGET)


def test_the_samplers_densities_must_leave_room_in_the_clip_range() -> None:
    """What the training forward's own old log-density forgives, the sampler's does not."""
    drift = drifted(0, 0.0, 0.0, 0.1)  # mean .025; clip_range / 2 is .005
    Guard(config.load("embedded")).drift(drift, BUDGET)
    guard = Guard(config.load("embedded", [("train.old_logp", "sampling")]))
    with pytest.raises(Disagreement, match=r"clip_range / 2 is 0.005. Set train.old_logp to train"):
        guard.drift(drift, BUDGET)


def test_a_few_overflows_in_fp16_are_a_search_many_are_not() -> None:
    guard = Guard(config.load("embedded", [("model.dtype", "fp16")]))
    guard._rows = [torch.ones(1, 7)]
    guard.texts = ["a", "b"]
    for _ in range(OVERFLOWS - 1):
        guard.norm(1.0, taken=False)
        guard._rows = [torch.ones(1, 7)]
    with pytest.raises(NonFinite, match=f"{OVERFLOWS} times in a row"):
        guard.norm(1.0, taken=False)
