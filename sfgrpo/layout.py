"""Which trajectories, rows and micro-batches belong to this rank, and in what order.

Trajectory numbers run over the whole iteration, p * N + n, and each rank owns a contiguous share;
a group may span ranks. Everything here is a function of the recipe, the seed and the iteration:
any number of ranks samples the same trajectories and gives the same rows to the same optimiser
step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sfgrpo import credit, rewards, sde, solvers
from sfgrpo.config import Recipe
from sfgrpo.rollout import Plan
from sfgrpo.solvers import Method

RESOLVED = 2**-20
"""The least noise that fp32 latents resolve, of size 1 to 4: below, the next state is its own
rounding and so is the log-density."""


class Layout:
    """The steps of the sampler and this rank's share of the work."""

    def __init__(
        self, recipe: Recipe, sigmas: Tensor, *, rank: int, world: int, device: torch.device
    ) -> None:
        """Lay out `recipe` over the schedule `sigmas [T + 1]`; with `model.context_parallel`,
        `rank` and `world` are those of context groups.

        Raises:
            ValueError: numbers that do not fit together, naming the keys; an unknown mixture, or a
                reward that cannot be imported.
        """
        s, train = recipe.sample, recipe.train
        self.recipe, self.device = recipe, device
        credit.mixture(recipe.credit)
        self.final_only = rewards.of_final_images(recipe.reward, recipe.reward_final_only)
        """The rewards that score final images alone."""
        table = sde.coefficients(sigmas, s.sampler, s.eta, options=s.sampler_options)
        self.faint_T = (table[:, 2] > 0) & (table[:, 2] < max(s.min_noise, RESOLVED))
        """bool `[T]`: steps whose noise is below `sample.min_noise`, or lost in rounding."""
        self._noise_T = table[:, 2].tolist()
        self._sigmas, self._table = sigmas, sde.quieted(table, sigmas, self.faint_T)
        self.trajectories = s.prompts_per_iteration * s.group_size
        self._windows = self._places()
        steps = len(self._windows[0])
        if self.trajectories % world:
            context = recipe.model.context_parallel
            shares = f"groups of {context} ranks" if context > 1 else "ranks"
            raise ValueError(
                f"sample: {self.trajectories} trajectories (prompts_per_iteration x group_size) do "
                f"not divide over {world} {shares}"
            )
        self.local = self.trajectories // world
        if self.local * steps % train.updates_per_iteration:
            raise ValueError(
                f"train.updates_per_iteration: {train.updates_per_iteration} does not divide the "
                f"{self.local * steps} rows of a rank ({self.local} trajectories x {steps} noisy "
                "steps)"
            )
        self.share = slice(rank * self.local, (rank + 1) * self.local)
        self.rows_per_update = self.local * steps // train.updates_per_iteration
        self.micro_batches = -(-self.rows_per_update // train.micro_batch_size)

    def told(self) -> list[str]:
        """What a user should know before the first iteration, a line each."""
        least = max(self.recipe.sample.min_noise, RESOLVED)
        return [
            f"step {k} ({self._sigmas[k]:.4g} -> {self._sigmas[k + 1]:.4g}) draws no noise and is "
            f"not trained: {self._noise_T[k]:.2g} is below sample.min_noise {least:.2g}"
            for k in self.faint_T.nonzero().flatten().tolist()
        ] + [
            f"reward '{name}' scores final images alone: its share is credited to all noisy steps "
            "alike"
            for name in self.recipe.reward
            if name in self.final_only and credit.get(self.recipe.credit).estimates
        ]  # fmt: skip

    def _places(self) -> list[tuple[int, ...]]:
        """The steps with noise of an iteration, for every place of the window; the same number in
        each. Without a window the one place is all of them."""
        s = self.recipe.sample
        noisy = (self._table[:, 2] > 0).nonzero().flatten().tolist()
        if not noisy:
            raise ValueError(
                f"sample: '{s.sampler}' with eta {s.eta} and {s.num_steps} steps has no noisy step"
                + (f" above min_noise {s.min_noise}" if self.faint_T.any() else "")
            )
        if s.window is None:
            return [tuple(noisy)]
        first, last = s.window.range or (0, s.num_steps)
        within, w = [k for k in noisy if first <= k < last], s.window.steps
        if len(within) < w:
            raise ValueError(
                f"sample.window: {w} steps do not fit into the {len(within)} noisy ones of the "
                f"sampler between step {first} and {last}: {within}"
            )
        return [tuple(within[k : k + w]) for k in range(len(within) - w + 1)]

    def _place(self, iteration: int) -> tuple[int, ...]:
        """The iteration's window, the same for all groups and ranks."""
        window, places = self.recipe.sample.window, self._windows
        if window is None or window.schedule == "frozen":
            return places[0]
        if window.schedule == "progressive":
            return places[iteration // window.interval * window.stride % len(places)]
        draw = np.random.default_rng((self.recipe.run.seed, iteration))
        return places[int(draw.integers(len(places)))]

    def schedule(self, iteration: int) -> sde.Schedule:
        """The steps of an iteration, on the CPU; every iteration has as many noisy ones."""
        return self._schedule_of(self._place(iteration))

    def _schedule_of(self, place: tuple[int, ...]) -> sde.Schedule:
        window, train = self.recipe.sample.window, self.recipe.train
        noisy_T = torch.zeros(len(self._table), dtype=torch.bool, device="cpu")
        noisy_T[list(place)] = True
        table = sde.quieted(self._table, self._sigmas, ~noisy_T & (self._table[:, 2] > 0))
        # Weights of all steps: a row's does not depend on which others are in its window.
        weight_T = sde.step_weights(self._table, train.step_weights, train.ratio)
        ends = window is not None and window.continuation == "solver"
        return sde.Schedule(
            table=table, kl_scale_T=sde.kl_scale(table, self._sigmas, train.kl),
            weight_T=weight_T * noisy_T, sampled=place[-1] + 1 if ends else len(table),
        )  # fmt: skip

    def scored_states(self, schedule: sde.Schedule) -> Tensor:
        """int64 `[T + 1]`: which state's rewards each state has (`credit.scored_states`)."""
        alone = self.final_only.issuperset(self.recipe.reward)
        return credit.scored_states(schedule.trainable_T, self.recipe.credit, final_only=alone)

    def methods(self, schedule: sde.Schedule) -> dict[int, Method]:
        """How each state is carried on whose clean estimate is asked for; the state behind the
        steps sampled is one of them unless it is the image."""
        options, levels = self.recipe.credit, dict(enumerate(schedule.table[:, 3].tolist()))
        scored = self.scored_states(schedule).tolist()
        asked = {*scored[:-1], schedule.sampled} - {len(levels)}
        return solvers.methods(
            options.solver, options.solver_options, {k: levels[k] for k in sorted(asked)}
        )

    def plan(self, iteration: int) -> Plan:
        """This rank's trajectories of an iteration, numbered for the noise."""
        P, N = self.recipe.sample.prompts_per_iteration, self.recipe.sample.group_size
        index = self.numbers()
        group, group_of_M = torch.unique_consecutive(index // N, return_inverse=True)
        return Plan(
            group_G=group + iteration * P,
            prompt_G=group,
            group_of_M=group_of_M,
            sample_M=index + iteration * P * N,
        )

    def numbers(self) -> Tensor:
        """int64 `[M]`: the numbers of this rank's trajectories within the iteration."""
        return torch.arange(self.share.start, self.share.stop, device=self.device)

    def updates(self, iteration: int) -> list[tuple[Tensor, Tensor]]:
        """For each optimiser step, the `(trajectory [R], step [R])` pairs it uses, mixed.

        Trajectories count within this rank. Rows are dealt out to the optimiser steps in turn, so
        that each takes as many of a rank's rows, and as many of a trajectory's but for one.
        """
        seed = self.recipe.run.seed * 1_000_003 + iteration
        K = self.recipe.train.updates_per_iteration
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        steps = self.schedule(iteration).trainable_T.nonzero().flatten()
        keys = torch.rand(
            self.trajectories, len(steps), generator=generator, dtype=torch.float32, device="cpu"
        )
        step = steps[keys[self.share].argsort(1)].flatten()
        trajectory = torch.arange(self.local, device="cpu").repeat_interleave(len(steps))
        pairs = []
        for update in range(K):
            mix = torch.randperm(self.rows_per_update, generator=generator, device="cpu")
            pairs.append(tuple(x[update::K][mix].to(self.device) for x in (trajectory, step)))
        return pairs
