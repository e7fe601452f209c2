"""Rows of an iteration -> optimiser steps.

The ratio's old log-density is that of the policy before the iteration's first update. Rows of that
update take it from the forward that trains them: their ratio is exactly 1 and their gradient the
policy gradient. Rows of later updates get one forward without gradient before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfgrpo import drift, offload
from sfgrpo.config import Recipe
from sfgrpo.engine import Engine
from sfgrpo.guard import Guard
from sfgrpo.layout import Layout
from sfgrpo.loss import Rows, TrajectoryRows, log_density, policy_loss
from sfgrpo.policy import Ema, Policy
from sfgrpo.rollout import VelocityField, batches
from sfgrpo.sections import Train
from sfgrpo.statistics import RowStatistics


def changes(train: Train) -> bool:
    """Whether the learning rate is not the same all the time."""
    return train.warmup > 0 or train.rate_decay is not None


def learning_rate(train: Train, iteration: int) -> float:
    """That of an iteration, counted from 0: a function of it alone, so that runs may stop anywhere.

    The first of `warmup` iterations has 1 / (warmup + 1) of it, the one after them the whole. The
    last of `rate_decay.iterations` has its `end`, which stays.
    """
    if iteration < train.warmup:
        return train.learning_rate * (iteration + 1) / (train.warmup + 1)
    if (decay := train.rate_decay) is None:
        return train.learning_rate
    steps = max(1, decay.iterations - 1 - train.warmup)
    done = min(1.0, (iteration - train.warmup) / steps)
    left = 1 - done if decay.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return train.learning_rate * (decay.end + (1 - decay.end) * left)


class Update:
    """Trains a policy on the rows of one iteration after the other."""

    def __init__(
        self, recipe: Recipe, layout: Layout, engine: Engine, policy: Policy, ema: Ema | None,
        guard: Guard, *, elements: int,
    ) -> None:  # fmt: skip
        """`elements`: D, numbers of one latent."""
        self.recipe, self.layout, self.engine, self.policy = recipe, layout, engine, policy
        self.ema, self.guard, self.elements = ema, guard, elements

    def __call__(
        self, field: VelocityField, rows: TrajectoryRows, iteration: int
    ) -> dict[str, Any]:
        """Split the rows over optimiser steps and micro-batches, and take the steps; returns what
        the iteration's metrics say of them."""
        train, statistics = self.recipe.train, RowStatistics()
        rate = learning_rate(train, iteration)
        self.engine.set_learning_rate(rate)
        scale = self.engine.row_weight(self.layout.rows_per_update)
        updates, budget = self.layout.updates(iteration), self.drift_budget(rows)
        old_MT = self.old_log_densities(field, rows, updates[1:], statistics)
        for update, (trajectory, step) in enumerate(updates):
            own = update == 0 and train.old_logp == "training"
            for part in batches(len(step), train.micro_batch_size):
                at = trajectory[part], step[part]
                batch = rows.take(*at)
                # First: the layers that stage 3 gathers for the forward serve the backward then.
                v_ref = self.reference_velocity(field, batch) if train.beta else None
                with offload.activations(train.offload_activations):
                    v, v_uncond = field(batch.x, batch.coef[:, 3], batch.prompt)
                result = policy_loss(
                    batch, v, v_uncond, v_ref, logp_old=None if own else old_MT[at],
                    guidance=field.guidance, clip_range=train.clip_range, beta=train.beta,
                    scale=scale, ratio=train.ratio,
                )  # fmt: skip
                statistics.add(result.stats, batch.step)
                self.guard.rows(batch, result)
                if update == 0:
                    statistics.compare(result.stats.logp, batch)
                    if part.stop == len(step):
                        self.guard.drift(statistics.measure_drift(len(budget)), budget)
                taken = self.engine.backward(result.loss)
            norm = self.guard.norm(self.engine.grad_norm(), taken=taken)
            statistics.add_step(norm, taken=taken)
            if self.ema and taken:
                self.ema.update()
        told = {"learning_rate": rate} if changes(train) else {}
        return {**statistics.summary(train.beta, budget), **told, **self._scaling(statistics)}

    @torch.no_grad()
    def old_log_densities(
        self, field: VelocityField, rows: TrajectoryRows, updates: Sequence[tuple[Tensor, Tensor]],
        statistics: RowStatistics,
    ) -> Tensor:  # fmt: skip
        """`[M, T]`: log-densities before the first update, for the rows of the later `updates`: of
        the forward that trains them, in the same micro-batches, or the sampler's."""
        if self.recipe.train.old_logp == "sampling":
            return rows.logp_MT
        old_MT = rows.logp_MT.clone()
        for trajectory, step in updates:
            for part in batches(len(step), self.recipe.train.micro_batch_size):
                at = trajectory[part], step[part]
                batch = rows.take(*at)
                v, v_uncond = field(batch.x, batch.coef[:, 3], batch.prompt)
                old_MT[at] = log_density(batch, v, v_uncond, guidance=field.guidance)
                statistics.compare(old_MT[at], batch)
        return old_MT

    def drift_budget(self, rows: TrajectoryRows) -> list[float]:
        """What rounding explains of the difference between rollout and training, each step."""
        return drift.budget(
            rows.schedule.table,
            tolerance=drift.tolerance(self.recipe, rows.latents_MS.device),
            guidance=self.recipe.sample.guidance_scale, elements=self.elements,
        )  # fmt: skip

    def reference_velocity(self, field: VelocityField, batch: Rows) -> Tensor:
        """The guided velocity of the policy as it was before training."""
        with self.policy.reference() as network:
            start = replace(field, network=network)
            return start.guided(*start(batch.x, batch.coef[:, 3], batch.prompt))

    def _scaling(self, statistics: RowStatistics) -> dict[str, float]:
        """What fp16 adds to the metrics."""
        if self.recipe.model.dtype != "fp16":
            return {}
        return {"loss_scale": self.engine.loss_scale(), "skipped_steps": statistics.skipped}
