"""What is measured: trajectories sampled once, and the rewards of their states by any solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfgrpo import cost, credit, engine, evaluate, solvers, standing
from sfgrpo.backbones.base import Backbone
from sfgrpo.config import Recipe
from sfgrpo.credit import Rewards
from sfgrpo.layout import Layout
from sfgrpo.rollout import Trajectories, sample
from sfgrpo.run.clock import Clock
from sfgrpo.score import at_their_states, score
from sfgrpo.solvers import Method
from sfgrpo.standing import Standing, altered
from sfgrpo.tally import Tally

Seen = Callable[[int], object]
"""Hears of work that is done: velocities of so many rows, or so many images scored."""


@dataclass(frozen=True)
class Solver:
    """A solver with its options."""

    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name} {value}" for name, value in self.options.items())])


@dataclass
class Heard(Tally):
    """Counts, and tells of each forward."""

    seen: Seen = lambda count: None

    def rows(self, count: int, *, gradient: bool) -> None:
        super().rows(count, gradient=gradient)
        self.seen(count)


@dataclass(frozen=True, kw_only=True)
class Setup(Standing):
    """A recipe's policy, before training or after some of it, and what scores it; the recipe has
    the probe's number of prompts, noise in all steps, and all rows in one update."""

    seen: Seen
    iteration: int = 0
    """How many iterations the policy was trained for."""

    @property
    def groups(self) -> tuple[int, int]:
        """Prompts P and trajectories of each N."""
        return self.recipe.sample.prompts_per_iteration, self.recipe.sample.group_size

    def layout(self, recipe: Recipe) -> Layout:
        """Of this process alone."""
        sigmas = self.field.backbone.sigmas(recipe.sample.num_steps, self.latent_shape)
        return Layout(recipe, sigmas, rank=0, world=1, device=self.field.backbone.device)


def probed(recipe: Recipe, count: int) -> Recipe:
    """The recipe with so many prompts, noise in all steps, and nothing that only training needs."""
    return altered(
        recipe,
        sample={"prompts_per_iteration": count, "window": None},
        train={"updates_per_iteration": 1, "beta": 0.0},
    )


def prepare(
    recipe: Recipe, count: int, seen: Seen, *, restore: Callable[[Backbone], int] = lambda _: 0
) -> Setup:
    """Load what the recipe names, for `count` of its training prompts, spread evenly. `restore`
    gives the backbone the weights of a checkpoint, if it is of one, and says which iteration's.

    Raises:
        ValueError: as `sfgrpo.trainer.Trainer`; the process is one of several ranks.
        OSError: a model or a file that is not there.
    """
    engine.start()
    if engine.world() > 1:
        raise ValueError(f"it runs in one process, and this is one of {engine.world()} ranks")
    credit.get(recipe.credit)
    credit.mixture(recipe.credit)
    solvers.methods(recipe.credit.solver, recipe.credit.solver_options, {0: 1.0})
    found = standing.prepare(
        recipe, lambda split: evaluate.chosen(split.train, count), tally=Heard(seen=seen)
    )
    iteration = restore(found.field.backbone)
    probing = probed(recipe, len(found.prompts))
    return Setup(**{**vars(found), "recipe": probing}, seen=seen, iteration=iteration)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rewards by one solver, and what they cost."""

    rewards: Rewards
    """Of every state; of one that is not scored, that of the next one that is."""
    evaluations: float
    """Network rows for the estimates of one trajectory; under guidance a velocity takes two."""
    images: float
    """Images decoded and scored of one trajectory."""
    seconds: float
    """Of the estimates of all trajectories."""


class Trial:
    """Trajectories of one schedule, and the rewards of their states by one solver after another."""

    def __init__(self, setup: Setup, recipe: Recipe) -> None:
        """`recipe` says where the noise is, and which states its credit rule needs."""
        self.setup, self.recipe = setup, recipe
        self.options, self.layout = recipe.credit, setup.layout(recipe)
        self.schedule = self.layout.schedule(0)
        self.levels = self.schedule.table[:, 3].tolist()
        self.rows = cost.sampling(self.layout, self.schedule)
        """Network rows that sampling takes."""

    @property
    def sampling(self) -> float:
        """Network rows that sampling one trajectory takes."""
        return self.rows / self.layout.trajectories

    def by(self, solver: Solver) -> Recipe:
        """The recipe with another solver, and nothing that only training evaluates."""
        return altered(
            self.recipe,
            credit={"solver": solver.name, "solver_options": dict(solver.options)},
            train={"old_logp": "sampling"},
        )

    def work(self, chosen: Sequence[Solver]) -> int:
        """What `Setup.seen` will hear of in all: sampling once, then estimates and scores by each.

        Raises:
            ValueError: a solver that cannot be at one of the levels.
        """
        sigmas = self.setup.field.backbone.sigmas(len(self.levels), self.setup.latent_shape)
        each = [cost.expected(self.by(solver), sigmas) for solver in chosen]
        return self.rows + sum(one.velocity - self.rows + one.scored for one in each)

    def sample(self) -> Trajectories:
        """The trajectories, every state that is needed led on by its own velocity to t = 0."""
        setup = self.setup
        return sample(
            setup.field, self.schedule.table, self.layout.plan(0),
            seed=self.recipe.run.seed, latent_shape=setup.latent_shape,
            methods=self._methods(Solver("tweedie", {})), sampled=self.schedule.sampled,
        )  # fmt: skip

    def rewards(self, made: Trajectories, solver: Solver) -> Scored:
        """The rewards of what `sample` made, by a solver; `made` stays as it is."""
        setup, clock = self.setup, Clock()
        before = replace(setup.field.tally)
        begun = _begun(made, self._methods(solver), self.levels)
        clock.lap("begin")
        scores_MK = score(setup.field, begun, setup.reward, setup.prompts, laps=clock)
        tally, all_of_them = setup.field.tally, self.layout.trajectories
        setup.seen(tally.scored - before.scored)
        return Scored(
            rewards=self._of_all_states(scores_MK),
            evaluations=(tally.velocity - before.velocity) / all_of_them,
            images=(tally.scored - before.scored) / all_of_them,
            seconds=clock.seconds["begin"] + clock.seconds["estimates"],
        )

    def _methods(self, solver: Solver) -> dict[int, Method]:
        return self.setup.layout(self.by(solver)).methods(self.schedule)

    def _of_all_states(self, scores_MK: Mapping[str, Tensor]) -> Rewards:
        """`[P, N, T + 1]` from the rewards of the states that are scored."""
        where_S, shape = self.layout.scored_states(self.schedule), self.setup.groups
        scores_PNK = {name: s.cpu().unflatten(0, shape) for name, s in scores_MK.items()}
        known = at_their_states(scores_PNK, self.setup.reward, where_S)
        return credit.filled(known, where_S, self.schedule.trainable_T, self.options)


def _begun(
    made: Trajectories, methods: Mapping[int, Method], levels: Sequence[float]
) -> Trajectories:
    """Trajectories whose states were led to t = 0, led over each method's first length instead."""
    states = made.states
    x_U, parts = states.x_U.clone(), []
    for part in states.unfinished:
        method = methods[part.step]
        if part.behind is None:  # x - t v and x - first v lie on one line through x
            x = made.latents_MS[states.member_U[part.rows], part.step]
            x_U[part.rows] = x.lerp(states.x_U[part.rows], method.first / levels[part.step])
        parts.append(replace(part, method=method))
    return replace(made, states=replace(states, x_U=x_U, unfinished=tuple(parts)))
