"""The probe of a generator with known velocities, and of a small pipeline from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import cli
from sfgrpo.config import Recipe
from sfgrpo.credit import Rewards
from sfgrpo.guard import NonFinite
from sfgrpo.probe import experiment, findings, signal, text
from sfgrpo.probe.experiment import Heard, Setup, Solver, Trial, altered, probed
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Mixture
from sfgrpo.rollout import VelocityField, sample
from sfgrpo.run.clock import Clock
from sfgrpo.score import score
from tests.support.rollouts import CENTRES, GROUPS, SHAPE, SIZE, T, forward_rows
from tests.support.toy import PointBackbone, PointVelocity

Scores = Callable[[Tensor], Tensor]


class Winding(PointVelocity):
    """A field whose paths bend and part: data are no points, so that final rewards differ."""

    def forward(self, x: Tensor, t: Tensor, centre: Tensor) -> Tensor:
        self.rows.append(len(x))
        t, centre = t.view(-1, 1, 1, 1), centre.view(-1, 1, 1, 1)
        return torch.sin(x) + 0.5 * t * x.cos() - 0.5 * centre


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def setup(reward: Scores = brightness, *, guidance: float = 1.0, **sections: Any) -> Setup:
    """Three groups of four, six steps; `seen` of the result is a list's."""
    given = altered(
        Recipe(),
        sample={"num_steps": T, "group_size": SIZE, "guidance_scale": guidance},
        **sections,
    )
    backbone, heard = PointBackbone(), list[int]()
    backbone.transformer = Winding()

    def score_images(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        return reward(images)

    return Setup(
        recipe=probed(given, GROUPS), prompts=[Prompt(c, {}) for c in CENTRES],
        reward=Mixture({"r": score_images}, {"r": 1.0}), latent_shape=SHAPE, seen=heard.append,
        field=VelocityField(
            backbone=backbone, network=backbone.transformer,
            conditioning=backbone.encode(CENTRES),
            unconditional=backbone.encode([""]) if guidance != 1 else None,
            guidance=guidance, batch_size=64, tally=Heard(seen=heard.append),
        ),
    )  # fmt: skip


def probe(which: Setup) -> findings.Findings:
    return findings.Probe(which).run(lambda what: None)


def test_solvers_are_measured_by_the_exact_ode() -> None:
    found = probe(setup())
    agreement = {row.name: row.agreement.value for row in found.rows}
    assert agreement["exact"] == pytest.approx(1, abs=1e-12)
    assert agreement["third_order"] > agreement["midpoint"] > agreement["tweedie"]
    assert agreement["euler substeps 5"] > agreement["euler substeps 2"] > agreement["tweedie"]
    assert [row.name for row in found.rows if row.chosen] == ["by_level"]
    assert agreement["uniform credit"] < 0.9
    for row in found.rows:
        noiseless = [place for place, value in enumerate(row.per_step) if value is None]
        assert noiseless == [s.step for s in found.steps if s.noise == 0]


def test_a_rule_with_a_known_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages with noise as strong as they are have a correlation of 1 / sqrt(2)."""
    comparison = findings.Comparison(Trial(setup(), setup().recipe), _rewards(64, 64, T + 1))
    exact = comparison.exact_PNT
    noise = exact[..., comparison.trainable_T].std() * torch.randn(exact.shape)
    row = comparison.row("x", exact + noise, chosen=False, evaluations=0, images=0, seconds=0)
    assert row.agreement.value == pytest.approx(math.sqrt(0.5), abs=4 * row.agreement.error)
    assert 0 < row.agreement.error < 0.02


def _rewards(*shape: int) -> Rewards:
    torch.manual_seed(0)
    rewards = torch.rand(*shape)
    rewards[..., 0] = rewards[:, :1, 0]  # a group starts from one noise
    return Rewards.one(rewards)


def test_shares_sum_to_one_and_are_those_of_independent_gains() -> None:
    found = probe(setup())
    assert sum(step.share.value for step in found.steps) == pytest.approx(1, abs=1e-6)
    torch.manual_seed(0)
    gains = torch.tensor([1.0, 0.0, 2.0, 1.0]) * torch.randn(200, 50, 4)
    rewards = torch.cat([torch.randn(200, 1, 1).expand(-1, 50, 1), gains], -1).cumsum(-1)
    expected = torch.tensor([1, 0, 4, 1]) / 6
    torch.testing.assert_close(signal.shares(rewards).float(), expected, rtol=0, atol=0.02)
    assert float(signal.shares(rewards).sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_costs_are_the_forwards_and_the_bar_ends_at_its_total(guidance: float) -> None:
    which = setup(guidance=guidance)
    heard: list[int] = which.seen.__self__  # pyright: ignore[reportFunctionMemberAccess]
    plan = findings.Probe(which)
    found = plan.run(lambda what: None)
    assert sum(heard) == plan.work
    assert sum(heard) - which.field.tally.scored == sum(forward_rows(which.field))
    by_name, branches = {row.name: row for row in found.rows}, 1 if guidance == 1 else 2
    states = by_name["midpoint"].images - 1  # a trajectory's share of those that are estimated
    assert by_name["tweedie"].evaluations == 0
    assert by_name["midpoint"].evaluations == pytest.approx(branches * states)
    assert by_name["euler substeps 5"].evaluations == pytest.approx(branches * 4 * states)


@pytest.mark.parametrize("solver", findings.SOLVERS, ids=str)
@pytest.mark.parametrize("window", [False, True])
def test_estimates_are_those_of_an_iteration(solver: Solver, window: bool) -> None:
    """Begun anew from stored states, they are what sampling with this solver would have begun."""
    which = setup()
    recipe = which.recipe
    if window:
        recipe = findings.windows(recipe, range(1, T - 1))[0]
    trial = Trial(which, recipe)
    made = trial.sample()
    before = made.states.x_U.clone()
    found = trial.rewards(made, solver).rewards.total
    assert torch.equal(made.states.x_U, before)
    layout = which.layout(trial.by(solver))
    usual = sample(
        which.field, trial.schedule.table, layout.plan(0), seed=recipe.run.seed,
        latent_shape=SHAPE, methods=layout.methods(trial.schedule), sampled=trial.schedule.sampled,
    )  # fmt: skip
    scores = score(which.field, usual, which.reward, which.prompts, laps=Clock())
    final = scores["reward"][:, -1].unflatten(0, (GROUPS, SIZE))
    torch.testing.assert_close(found[..., -1], final, rtol=1e-5, atol=1e-6)
    states = trial.layout.methods(trial.schedule)
    first = scores["reward"][:, 0].unflatten(0, (GROUPS, SIZE))
    torch.testing.assert_close(found[..., min(states)], first, rtol=1e-5, atol=1e-6)


def test_windows_cost_less_and_are_where_they_say() -> None:
    found = probe(setup())
    noisy = [step.step for step in found.steps if step.noise]
    assert [row.steps for row in found.windows][:2] == [noisy[:2], noisy[1:3]]
    assert {len(row.steps) for row in found.windows} == {2, 4} & set(range(len(noisy)))
    (whole,) = (row for row in found.rows if row.chosen)
    for row in found.windows:
        assert row.sampling < found.sampling
        assert row.images < whole.images
        assert 0.5 < row.agreement.value <= 1


def test_noise_of_the_reward_is_that_of_one_image() -> None:
    assert probe(setup()).reward_noise < 1e-6
    torch.manual_seed(0)
    found = probe(setup(lambda images: brightness(images) + 0.1 * torch.randn(len(images))))
    assert found.reward_noise == pytest.approx(0.1, rel=0.3)


def test_a_rule_without_estimates_is_the_one_chosen() -> None:
    found = probe(setup(credit={"rule": "uniform"}))
    assert [row.name for row in found.rows if row.chosen] == ["uniform credit"]
    assert found.rule == "stepwise"
    assert all(row.images == 1 for row in found.windows)


def test_a_solver_of_the_recipes_that_is_not_in_the_table_is_added() -> None:
    own = {"solver": "euler", "solver_options": {"substeps": 3}}
    rows = probe(setup(credit=own)).rows
    assert [row.name for row in rows if row.chosen] == ["euler substeps 3"]
    rows = probe(setup(credit={"solver": "euler", "solver_options": {}})).rows
    assert [row.name for row in rows if row.chosen] == ["euler substeps 5"]
    assert len(rows) == 1 + len(findings.SOLVERS)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = torch.rand(20, dtype=torch.float64)
    error = signal.jackknife(lambda rows: values[rows].mean(), 20)
    torch.testing.assert_close(error, values.std() / math.sqrt(20))
    assert signal.jackknife(lambda rows: values[rows].mean(), 1).isnan()


def test_a_window_that_changes_no_reward_spoils_nothing() -> None:
    """The first window has too little noise for a reward in coarse steps."""
    coarse = probe(setup(lambda images: (15 * brightness(images)).round()))
    assert any(row.reward_std == 0 and math.isnan(row.agreement.value) for row in coarse.windows)
    assert not all(math.isnan(row.agreement.value) for row in coarse.windows)
    assert " - " in text.as_text(coarse).split("noise in steps")[1]


def test_nothing_to_credit_is_said() -> None:
    with pytest.raises(ValueError, match="the final reward is the same in all trajectories"):
        probe(setup(lambda images: torch.zeros(len(images))))
    with pytest.raises(NonFinite, match="no group is left"):
        probe(setup(lambda images: torch.full((len(images),), math.nan)))


def test_a_group_with_a_reward_that_is_not_finite_is_left_out() -> None:
    first = 0.5 + float(CENTRES[0]) / 4

    def fails_on_the_first(images: Tensor) -> Tensor:
        bright = brightness(images)
        return torch.where((bright - first).abs() < 0.1, math.nan, bright)

    found = probe(setup(fails_on_the_first))
    assert found.dropped_groups == 1
    assert "1 groups left out" in text.as_text(found)


def test_the_command_writes_its_findings_and_no_run(
    recipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, out, run = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "run"
    file.write_text(json.dumps(recipe(run).model_dump(mode="json")))
    small = ["--prompts", "1", "--sample.num_steps", "3"]
    assert cli.main(["probe", str(file), *small, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((out / "probe.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["probe.json", "probe.png"]
    assert not run.exists()
    assert json.loads(printed)["rows"][-1]["agreement"] == {
        "value": pytest.approx(1),
        "error": None,
    }


def test_what_cannot_be_probed_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "prepare", pytest.fail)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "embedded").mkdir()  # the recipe of that name is meant below
    monkeypatch.chdir(tmp_path)
    assert cli.main(["probe", f"{tmp_path}/folder"]) == 2
    assert "holds no run: there is no recipe.yaml" in capsys.readouterr().err
    for given, message in (
        ("--prompts 0", "--prompts: must be at least 1, got 0"),
        ("--checkpoint 5", "--checkpoint 5: 'embedded' is no run's folder"),
        (f"--out {tmp_path}/file", "File exists"),
        ("--sample.group_size 1", "sample.group_size: Input should be greater than or equal to 2"),
    ):
        assert cli.main(["probe", "embedded", *given.split()]) == 2
        assert message in capsys.readouterr().err
