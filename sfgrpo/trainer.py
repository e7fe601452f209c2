"""The training loop of Stepwise-Flow-GRPO.

Left out of the textbook GRPO: a value network, an entropy bonus, and several epochs over the same
rows. Each row of an iteration is used once; `updates_per_iteration` splits them over that many
optimiser steps.

Shapes: P prompts, N trajectories per group, M trajectories of this rank, T steps, S = T + 1 states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sfgrpo import backbones, credit, engine, evaluate, generator, prompts, rewards, solvers, zero
from sfgrpo.backbones import _context
from sfgrpo.backbones.base import Conditioning
from sfgrpo.config import Recipe, check_functions
from sfgrpo.credit import Rewards
from sfgrpo.embeddings import backbone_of, negatives
from sfgrpo.guard import Guard
from sfgrpo.layout import Layout
from sfgrpo.loss import TrajectoryRows
from sfgrpo.names import JUDGE
from sfgrpo.policy import Ema, Policy, check_start
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Failure
from sfgrpo.rollout import Plan, Trajectories, VelocityField, sample
from sfgrpo.run import agreement, failing, strips, tracking
from sfgrpo.run.clock import Clock
from sfgrpo.run.peers import leave
from sfgrpo.run.progress import Progress
from sfgrpo.run.randomness import reseed
from sfgrpo.run.stopping import Interrupted, Signals
from sfgrpo.score import at_their_states, score
from sfgrpo.sde import Schedule
from sfgrpo.statistics import finite_groups, reward_statistics, total_cost
from sfgrpo.update import Update


class Trainer:
    """One run of one recipe, on this rank's share of the trajectories, or its context group's."""

    def __init__(
        self, recipe: Recipe, *, fresh: bool = False, end: Callable[[str], object] = leave
    ) -> None:
        """Load everything; continue the newest checkpoint of the run folder if there is one.

        `end` ends this process, and those of other ranks, for a reason.

        Raises:
            ValueError: values that do not fit together, naming the key.
            records.RunError: the folder holds the run of another recipe; the prompts of the ranks
                differ.
            checkpoints.CheckpointError: its checkpoints cannot be continued.
        """
        self.recipe, self.device, self.signals = recipe, engine.start(), Signals()
        self.context = recipe.model.context_parallel
        generator.check_context(recipe, engine.world())
        self.prompts = generator.prompts_of(recipe)
        agreement.check_prompts(self.prompts)
        # What is quickly found to be wrong comes before the network, which takes minutes to load.
        self.reward = rewards.load(
            recipe.reward, recipe.reward_options,
            frames=recipe.reward_frames, final_only=recipe.reward_final_only,
            calls=failing.calls(recipe, end),
        )  # fmt: skip
        self.reward.check(self.prompts.all, heard=backbones.makes_sound(recipe.model.backbone))
        self.judges = [
            JUDGE.bind(name, recipe.eval.judge_options.get(name)) for name in recipe.eval.judges
        ]
        trackers = tracking.starters(recipe) if engine.rank() == 0 else {}
        check_functions(recipe)
        solvers.methods(recipe.credit.solver, recipe.credit.solver_options, {0: 1.0})
        check_start(recipe.lora)
        self.backbone, self.embed = backbone_of(
            recipe, self.device, self.prompts, sharded=zero.shards_parameters(recipe)
        )
        self.latent_shape, self.shown_shape = generator.shapes(recipe, self.backbone)
        _context.check(self.backbone, self.context, [self.latent_shape, self.shown_shape])
        group, groups = engine.context_group(self.context)
        self.layout = Layout(
            recipe, self.backbone.sigmas(recipe.sample.num_steps, self.latent_shape),
            rank=group, world=groups, device=self.device,
        )  # fmt: skip
        self.guard = Guard(recipe)
        self.policy = Policy(self.backbone.transformer, recipe, self.backbone.lora_targets)
        if recipe.train.gradient_checkpointing:
            self.policy.checkpoint_gradients()
        self.engine = engine.Engine(
            self.policy.network, recipe, micro_batches=self.layout.micro_batches
        )
        decay = recipe.train.ema_decay
        self.ema = Ema(self.engine.masters, decay) if decay else None
        self.update = Update(
            recipe, self.layout, self.engine, self.policy, self.ema, self.guard,
            elements=math.prod(self.latent_shape),
        )  # fmt: skip
        self.progress = Progress(
            recipe, self.backbone, self.engine, self.ema, served=failing.served(self.reward),
            prompts=prompts.fingerprint(self.prompts), fresh=fresh, trackers=trackers,
        )  # fmt: skip

    @property
    def iteration(self) -> int:
        """Finished iterations."""
        return self.progress.state.iteration

    def train(self, signals: Signals | None = None) -> None:
        """Run to `run.iterations`: sample, score, credit, update.

        Raises:
            Interrupted: `signals` received one; what was finished is saved.
            RewardFailed: a reward failed in all attempts (`on_reward_failure`); likewise.
        """
        self.signals = signals = signals or self.signals
        last, failed = self.recipe.run.iterations, True
        bar = tqdm(
            total=last, initial=self.iteration, unit="it", disable=engine.rank() != 0,
            desc=f"{self.recipe.credit.rule} credit", dynamic_ncols=True,
        )  # fmt: skip
        try:
            with bar:
                signals.check()
                for line in self.layout.told() if engine.rank() == 0 else ():
                    bar.write(line)
                if self.progress.owes_evaluation():
                    self.evaluate()
                while self.iteration < last:
                    signals.check()
                    clock = Clock()
                    metrics = self.iterate(clock, signals)
                    self.progress.state.iteration += 1
                    self.progress.log("metrics", metrics)
                    bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.1e}")
                    bar.update()
                    signals.check()
                    self.finish(clock)
            failed = False
        except (Interrupted, failing.RewardFailed) as stop:
            self.progress.save()
            failed = isinstance(stop, failing.RewardFailed)
            raise
        finally:
            self.progress.close(failed=failed)

    def iterate(self, clock: Clock, signals: Signals) -> dict[str, Any]:
        """One iteration; returns its metrics. The weights change in the last phase only."""
        reseed(self.recipe.run.seed, self.iteration, engine.rank())
        plan, chosen = self.layout.plan(self.iteration), self.draw()
        schedule = self.layout.schedule(self.iteration)
        self.guard.begin(self.iteration, chosen)
        field = self.field(chosen)
        with self.engine.sampling():
            trajectories = self.sample(field, schedule, plan)
            clock.lap("rollout")
            signals.check()
            scored = self.score(field, trajectories, schedule, chosen, clock)
        if self.progress.evaluates(self.iteration + 1):
            self.keep_strip(trajectories, scored, schedule, plan, chosen)
            clock.lap("evaluate")
        signals.check()
        advantages_PNT = self.credit(scored, schedule)
        rows = self.rows(trajectories, advantages_PNT, schedule, plan)
        clock.lap("credit")
        metrics = reward_statistics(scored)
        if self.recipe.on_reward_failure == "drop_group":
            metrics["failed_groups"] = self.guard.failed_groups
        metrics |= self.update(field, rows, self.iteration)
        metrics["cost"] = total_cost(field.tally, self.device, context=self.context)
        clock.lap("train")
        return metrics

    def finish(self, clock: Clock) -> None:
        """After an iteration: evaluation and checkpoint where they are due."""
        if self.progress.owes_evaluation():
            self.evaluate()
            clock.lap("evaluate")
        if self.progress.owes_checkpoint():
            self.progress.save()
            clock.lap("checkpoint")
        images = self.layout.trajectories
        retried = failing.retried(self.reward)
        self.progress.log("timing", {**clock.row(images, self.device), **retried})

    def draw(self) -> list[Prompt]:
        """The iteration's P prompts."""
        drawn = prompts.draw(
            self.recipe.sample.prompts_per_iteration, len(self.prompts.train),
            seed=self.recipe.run.seed, iteration=self.iteration,
        )  # fmt: skip
        return [self.prompts.train[i] for i in drawn]

    @cached_property
    def negative(self) -> Conditioning:
        """What guidance leads away from, one row; it stays the same, so it is embedded once."""
        return self.embed(negatives([], self.recipe))

    def away(self, chosen: Sequence[Prompt]) -> Conditioning:
        """What guidance leads away from for these prompts, with their images if they have any."""
        pictured = any(prompt.images for prompt in chosen)
        return self.embed(negatives(chosen, self.recipe)) if pictured else self.negative

    def field(self, chosen: Sequence[Prompt]) -> VelocityField:
        """The velocity of the policy for these prompts."""
        guidance = self.recipe.sample.guidance_scale
        return VelocityField(
            backbone=self.backbone, network=self.engine.network, conditioning=self.embed(chosen),
            unconditional=self.away(chosen) if guidance != 1 else None, guidance=guidance,
            batch_size=self.recipe.sample.batch_size, pace=self.engine.pace, context=self.context,
            pause=self.signals.check,
        )  # fmt: skip

    def sample(self, field: VelocityField, schedule: Schedule, plan: Plan) -> Trajectories:
        """Trajectories of the plan, and where their clean estimates begin."""
        return sample(
            field, schedule.table, plan,
            seed=self.recipe.run.seed, latent_shape=self.latent_shape,
            methods=self.layout.methods(schedule), sampled=schedule.sampled,
        )  # fmt: skip

    def score(
        self, field: VelocityField, made: Trajectories, schedule: Schedule,
        chosen: Sequence[Prompt], clock: Clock,
    ) -> Rewards:  # fmt: skip
        """Rewards of all states of the whole group."""
        shape = (self.recipe.sample.prompts_per_iteration, self.recipe.sample.group_size)
        scores_MK = score(
            field, made, self.reward, chosen, laps=clock, ahead=self.recipe.reward_ahead
        )
        failures = failing.settle(self.reward, self.recipe.on_reward_failure)
        numbers = self.layout.numbers()
        scores_PNK = {
            name: engine.gather(scores_MK[name], numbers).unflatten(0, shape)
            for name in self.reward.weights
        }
        where_S = self.layout.scored_states(schedule).to(self.device)
        known = at_their_states(scores_PNK, self.reward, where_S)
        self.guard.rewards(known, failures, engine.gather(made.spoilt_M, numbers))
        if self.guard.failed_groups == len(known.total):
            raise failing.RewardFailed(f"no group is left: {failures[0].message}")
        trainable_T = schedule.trainable_T.to(self.device)
        return credit.filled(known, where_S, trainable_T, self.recipe.credit)

    def keep_strip(
        self, made: Trajectories, scored: Rewards, schedule: Schedule, plan: Plan,
        chosen: Sequence[Prompt],
    ) -> None:  # fmt: skip
        """Keep the clean estimates of two of rank 0's trajectories as pictures."""
        if not self.progress.main:
            return
        states = self.layout.scored_states(schedule).unique().tolist()
        levels = [*schedule.table[:, 3].tolist(), 0.0]
        strips.keep(
            self.progress.folder, self.iteration + 1, self.backbone, made,
            scored.total.flatten(0, 1)[self.layout.share][:, states], plan,
            states=states, levels=[levels[k] for k in states], prompts=chosen,
        )  # fmt: skip

    def credit(self, scored: Rewards, schedule: Schedule) -> Tensor:
        """Advantages `[P, N, T]` of every step of the whole group; 0 in groups that are dropped."""
        total_PNS = scored.total
        trainable_T = schedule.trainable_T.to(total_PNS.device)
        kept_P = finite_groups(total_PNS)
        advantages_PNT = total_PNS.new_zeros(*total_PNS.shape[:2], len(trainable_T))
        advantages_PNT[kept_P] = credit.advantages(scored[kept_P], trainable_T, self.recipe.credit)
        return advantages_PNT

    def rows(
        self, trajectories: Trajectories, advantages_PNT: Tensor, schedule: Schedule, plan: Plan
    ) -> TrajectoryRows:
        """This rank's trajectories with their advantages."""
        return TrajectoryRows(
            latents_MS=trajectories.latents_MS,
            logp_MT=trajectories.logp_MT,
            advantages_MT=advantages_PNT.flatten(0, 1)[self.layout.share],
            prompt_M=plan.prompt_G[plan.group_of_M],
            schedule=schedule.to(self.device),
        )

    def evaluate(self) -> None:
        """Measure the (averaged) policy on held-out noise; log the numbers, keep the images."""
        reseed(self.recipe.run.seed, self.iteration, engine.rank())
        chosen = evaluate.chosen(self.prompts.evaluation, self.recipe.eval.prompts)
        failures = list[Failure]()

        def settle() -> None:
            failures.extend(failing.settle(self.reward, self.recipe.on_reward_failure))

        with self.progress.averaged(), self.engine.sampling(), failing.blamed(failures):
            result = evaluate.of_recipe(
                self.recipe, self.field(chosen), chosen, self.reward, self.judges, self.guard,
                iteration=self.iteration, latent_shape=self.shown_shape, scored=settle,
            )  # fmt: skip
        self.progress.evaluated(result)
