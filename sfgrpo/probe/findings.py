"""Every solver on the same trajectories, measured by the exact estimates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfgrpo import credit
from sfgrpo.config import Credit, Recipe
from sfgrpo.credit import Rewards
from sfgrpo.guard import NonFinite
from sfgrpo.probe import signal
from sfgrpo.probe.experiment import Scored, Setup, Solver, Trial, altered
from sfgrpo.sections import Window
from sfgrpo.statistics import finite_groups

EXACT = Solver("exact", {})
"""What the others are measured by."""
SOLVERS = (
    Solver("tweedie", {}),
    Solver("euler", {"substeps": 2}),
    Solver("euler", {"substeps": 5}),
    Solver("midpoint", {}),
    Solver("third_order", {}),
    Solver("by_level", {}),
    EXACT,
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number and its standard error over prompts; nan of what is not defined."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One sampling step."""

    step: int
    t: float
    """Noise level before it."""
    noise: float
    """Standard deviation of what it draws; a step that draws none is not trained."""
    share: Measured
    """Of the final reward's variance within groups (`signal.shares`)."""
    gain: float
    """Mean |gain|."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to get advantages, against exact estimates."""

    name: str
    chosen: bool
    """Whether it is the recipe's."""
    agreement: Measured
    """Correlation of the advantages of all noisy steps with those of exact estimates."""
    per_step: list[float | None]
    """The same of each step; None of one without noise."""
    evaluations: float
    """Network rows for the estimates of one trajectory, beside those of sampling; under guidance a
    velocity takes two."""
    images: float
    """Images decoded and scored of one trajectory."""
    seconds: float
    """Of the estimates of all trajectories."""


@dataclass(frozen=True, kw_only=True)
class WindowRow:
    """Noise in a window of the steps, trajectories of its own."""

    steps: list[int]
    agreement: Measured
    """Of the recipe's advantages within the window with those of exact estimates; nan if no reward
    differs in a group, since the window has too little noise."""
    reward_std: float
    """Of the final reward within groups: what there is to learn from."""
    sampling: float
    """Network rows that sampling one trajectory takes."""
    evaluations: float
    images: float
    """As of `Row`."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything measured; `sfgrpo.probe.text` prints it."""

    iteration: int
    """How many iterations the policy was trained for."""
    prompts: int
    group_size: int
    rule: str
    """Of credit, that exact estimates are credited by."""
    sampling: float
    """Network rows that sampling one trajectory takes."""
    reward: float
    """Mean of the final images'."""
    reward_std: float
    """Its standard deviation within groups: what there is to learn from."""
    reward_noise: float
    """Standard deviation of the reward of one and the same image."""
    dropped_groups: int
    """Groups left out because a reward was not finite."""
    steps: list[Step]
    rows: list[Row]
    windows: list[WindowRow]


def reference(options: Credit) -> Credit:
    """What exact estimates are credited by: the recipe's rule, or stepwise credit if that needs no
    estimate."""
    if credit.get(options).estimates:
        return options
    return options.model_copy(update={"rule": "stepwise", "options": {}})


def without_estimates(options: Credit) -> Credit:
    """The rule that needs no estimate and is compared: the recipe's, or uniform credit."""
    if not credit.get(options).estimates:
        return options
    return options.model_copy(update={"rule": "uniform", "options": {}})


def recipes_solver(options: Credit) -> Solver | None:
    """The solver that a recipe uses, as it is called in `SOLVERS` if it is there; None if its rule
    needs no estimate."""
    if not credit.get(options).estimates:
        return None
    own = Solver(options.solver, dict(options.solver_options))
    return Solver("euler", {"substeps": 5}) if own == Solver("euler", {}) else own


def windows(recipe: Recipe, noisy: Sequence[int]) -> list[Recipe]:
    """The recipe with windows of 2, 4 and its own number of steps: at the first of the `noisy`
    steps, in the middle and at the last."""
    own = recipe.sample.window or Window()
    ends = own.continuation if recipe.credit.statistics == "trainable" else "steps"
    found = []
    for w in sorted({2, 4, own.steps}):
        last = len(noisy) - w
        for first in sorted({0, last // 2, last}) if last > 0 else ():
            span = (noisy[first], noisy[first + w - 1] + 1)
            window = Window(steps=w, schedule="frozen", range=span, continuation=ends)
            found.append(altered(recipe, sample={"window": window}))
    return found


class Probe:
    """All that is to be measured of a setup."""

    def __init__(self, setup: Setup) -> None:
        """Plan it.

        Raises:
            ValueError: a solver that cannot be at one of the states.
        """
        self.setup, self.options = setup, setup.recipe.credit
        self.own = recipes_solver(self.options)
        known = [self.own] if self.own and self.own not in SOLVERS else []
        self.solvers = [*known, *SOLVERS]
        recipe = setup.recipe.model_copy(update={"credit": reference(self.options)})
        self.trial = Trial(setup, recipe)
        noisy = self.trial.schedule.trainable_T.nonzero().flatten().tolist()
        self.windows = [Trial(setup, window) for window in windows(recipe, noisy)]
        self.in_windows = [EXACT] if self.own in (None, EXACT) else [EXACT, self.own]
        self.work = self.trial.work(self.solvers) + sum(
            trial.work(self.in_windows) for trial in self.windows
        )
        """What `Setup.seen` hears of in all."""

    def run(self, told: Callable[[str], object]) -> Findings:
        """Sample once, estimate by each solver; then each window. `told` hears what comes next.

        Raises:
            ValueError: the final reward differs in no group.
            NonFinite: no group is left whose rewards are all finite.
        """
        scored, kept_P = self._scored(self.trial, self.solvers, told)
        exact = scored[str(EXACT)].rewards
        final_PN = exact.total[..., -1]
        if not bool(signal.within(final_PN).any()):
            raise ValueError(
                "the final reward is the same in all trajectories of each group, so there is "
                "nothing to credit: it takes a larger sample.group_size or sample.eta, other "
                "prompts, or a reward that tells such images apart"
            )
        comparison = Comparison(self.trial, exact)
        repeated = torch.stack([found.rewards.total[..., -1] for found in scored.values()])
        P, N = self.setup.groups
        return Findings(
            iteration=self.setup.iteration, prompts=P, group_size=N,
            rule=self.trial.options.rule, sampling=self.trial.sampling,
            reward=float(final_PN.double().mean()), reward_std=signal.std_in_groups(final_PN),
            reward_noise=signal.repeat_noise(repeated), dropped_groups=int((~kept_P).sum()),
            steps=self._steps(exact.total),
            rows=[self._uniform(comparison, exact), *self._rows(comparison, scored)],
            windows=[self._window(trial, told) for trial in self.windows],
        )  # fmt: skip

    def _scored(
        self, trial: Trial, chosen: Sequence[Solver], told: Callable[[str], object]
    ) -> tuple[dict[str, Scored], Tensor]:
        """What each solver finds, of the groups whose rewards are all finite, and which they are,
        bool `[P]`."""
        told("sampling")
        made, found = trial.sample(), dict[str, Scored]()
        for solver in chosen:
            told(str(solver))
            found[str(solver)] = trial.rewards(made, solver)
        kept_P = torch.stack([finite_groups(one.rewards.total) for one in found.values()]).all(0)
        if not kept_P.any():
            raise NonFinite(f"no group is left: each of the {len(kept_P)} has a reward not finite")
        kept = {k: replace(s, rewards=s.rewards[kept_P]) for k, s in found.items()}
        return kept, kept_P

    def _window(self, trial: Trial, told: Callable[[str], object]) -> WindowRow:
        steps = trial.schedule.trainable_T.nonzero().flatten().tolist()
        place = f"window {steps[0]}-{steps[-1]}"
        scored, _ = self._scored(trial, self.in_windows, lambda what: told(f"{place}, {what}"))
        exact = scored[str(EXACT)].rewards
        comparison = Comparison(trial, exact)
        if self.own is None:
            row = self._uniform(comparison, exact)
        else:
            own = {str(self.own): scored[str(self.own)]}
            (row,) = self._rows(comparison, own)
        return WindowRow(
            steps=steps, agreement=row.agreement, sampling=trial.sampling,
            reward_std=signal.std_in_groups(exact.total[..., -1]),
            evaluations=row.evaluations, images=row.images,
        )  # fmt: skip

    def _steps(self, exact_PNS: Tensor) -> list[Step]:
        shares = measured(lambda rows: signal.shares(exact_PNS[rows]), len(exact_PNS))
        gains = credit.gains(exact_PNS).double().abs().mean((0, 1)).tolist()
        table = self.trial.schedule.table.tolist()
        return [
            Step(step=k, t=t, noise=n, share=share, gain=gain)
            for k, ((_, _, n, t), share, gain) in enumerate(zip(table, shares, gains, strict=True))
        ]

    def _uniform(self, comparison: Comparison, exact: Rewards) -> Row:
        options = without_estimates(self.options)
        found = credit.advantages(exact, comparison.trainable_T, options)
        return comparison.row(
            f"{options.rule} credit", found, chosen=self.own is None,
            evaluations=0.0, images=1.0, seconds=0.0,
        )  # fmt: skip

    def _rows(self, comparison: Comparison, scored: dict[str, Scored]) -> list[Row]:
        return [
            comparison.row(
                name, comparison.advantages(found.rewards), chosen=name == str(self.own),
                evaluations=found.evaluations, images=found.images, seconds=found.seconds,
            )
            for name, found in scored.items()
        ]  # fmt: skip


class Comparison:
    """Advantages against those of exact estimates."""

    def __init__(self, trial: Trial, exact: Rewards) -> None:
        self.trainable_T, self.options = trial.schedule.trainable_T, trial.options
        self.exact_PNT = self.advantages(exact)

    def advantages(self, rewards: Rewards) -> Tensor:
        """`[P, N, T]`, by the rule that exact estimates are credited by."""
        return credit.advantages(rewards, self.trainable_T, self.options)

    def row(self, name: str, found_PNT: Tensor, **cost: Any) -> Row:
        """What there is to say of advantages."""
        pairs = [(x[..., self.trainable_T]) for x in (found_PNT, self.exact_PNT)]
        (agreement,) = measured(
            lambda rows: signal.correlation(*(x[rows] for x in pairs)), len(found_PNT)
        )
        per_step = [
            float(signal.correlation(found_PNT[..., k], self.exact_PNT[..., k])) if noisy else None
            for k, noisy in enumerate(self.trainable_T.tolist())
        ]
        return Row(name=name, agreement=agreement, per_step=per_step, **cost)


def measured(statistic: Callable[[Tensor], Tensor], prompts: int) -> list[Measured]:
    """A statistic of the rows of prompts, and its error."""
    values = statistic(torch.arange(prompts)).reshape(-1).tolist()
    errors = signal.jackknife(statistic, prompts).reshape(-1).tolist()
    return [Measured(value=v, error=e) for v, e in zip(values, errors, strict=True)]
