"""How far a run is: its state, its logs, its checkpoints; where it continues."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file, save_file

from sfgrpo import engine, zero
from sfgrpo.backbones.base import Backbone
from sfgrpo.config import Recipe
from sfgrpo.evaluate import Evaluation
from sfgrpo.policy import Ema
from sfgrpo.run import agreement, alarms, checkpoints, origin, records, samples
from sfgrpo.run.checkpoints import Checkpoints, State
from sfgrpo.run.logs import Logs
from sfgrpo.run.tracking import Start, Tracking


class Progress:
    """The run in `run.output_dir`, new or continued."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        trained: engine.Engine,
        ema: Ema | None,
        *,
        prompts: str,
        served: Mapping[str, str],
        fresh: bool,
        trackers: Mapping[str, Start] | None = None,
    ) -> None:
        """Prepare the folder; load its newest whole checkpoint into `trained` and `ema`.

        `prompts` is the fingerprint of what the run trains on and shows, `served` what the servers
        of its rewards serve, `trackers` how those of `run.track` are started (rank 0).

        Raises:
            records.RunError: the folder holds the run of another recipe; ranks ask servers of
                different rewards.
            checkpoints.CheckpointError: its checkpoints cannot be continued.
        """
        self.recipe, self.backbone, self.trained, self.ema = recipe, backbone, trained, ema
        agreement.compare({f"behind reward '{name}'": what for name, what in served.items()})
        self.folder, self.main = Path(recipe.run.output_dir), engine.rank() == 0
        if self.main:
            records.prepare(self.folder, recipe, fresh=fresh)
            origin.keep(self.folder)
        engine.barrier()
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", recipe.checkpoint.keep, main=self.main
        )
        self.state = State(
            world=engine.world(), zero_stage=zero.stage(recipe),
            recipe=records.identity(recipe), prompts=prompts, served=dict(served),
        )  # fmt: skip
        self.saved = self._resume()
        if self.main:
            records.check_logs(self.folder, self.saved, recipe.checkpoint.every)
        self.logs = None
        if self.main:
            self.logs = Logs(self.folder, self.saved, Tracking(trackers or {}, self.folder, recipe))

    def _resume(self) -> int | None:
        """Continue the newest whole checkpoint; returns its iteration, None if there is none."""
        newest = None
        if self.main:
            self.checkpoints.clean()
            newest = self.checkpoints.newest()
        found = engine.largest(int(newest.name) if newest else -1)  # rank 0's answer
        if found < 0:
            return None
        folder, now = self.checkpoints.path(found), self.state
        state = checkpoints.load_state(folder)
        if why := checkpoints.refusal(
            state, zero_stage=now.zero_stage,
            recipe=records.identities(self.recipe), prompts=now.prompts, served=now.served,
        ):  # fmt: skip
            raise checkpoints.CheckpointError(f"'{folder}' cannot be continued: {why}")
        self.state = replace(
            state, world=now.world, zero_stage=now.zero_stage,
            recipe=now.recipe, prompts=now.prompts, served=now.served,
        )  # fmt: skip
        same = (state.world, state.zero_stage) == (now.world, now.zero_stage)
        if self.main and not same:
            print(
                f"sfgrpo: '{folder}' was written at ZeRO stage {state.zero_stage} on {state.world} "
                f"rank(s); the run goes on at stage {now.zero_stage} on {now.world}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        try:
            if same or state.zero_stage == 0:
                self.trained.load(folder)
            else:
                self.trained.load_anew(folder, stage=state.zero_stage, world=state.world)
        except UnpicklingError as error:
            raise checkpoints.CheckpointError(f"it cannot be continued: {error}") from error
        if self.ema:
            self.ema.load(load_file(folder / "ema.safetensors"))
        return found

    def log(self, log: str, values: Mapping[str, object]) -> None:
        """Append to a log of the run (rank 0)."""
        if self.logs:
            self.logs.write(log, self.state.iteration, values)

    def owes_evaluation(self) -> bool:
        """Whether this state is to be evaluated and has not been (a run can stop in between)."""
        return self.evaluates(self.state.iteration) and self.state.evaluated != self.state.iteration

    def evaluates(self, iteration: int) -> bool:
        """Whether the state after so many iterations is to be evaluated."""
        return iteration % self.recipe.eval.every == 0 or iteration == self.recipe.run.iterations

    def evaluated(self, result: Evaluation) -> None:
        """Log an evaluation, keep its images, and the weights if none was better."""
        state, reward = self.state, result.numbers["reward"]
        if self.main:
            signs = self._signs(result)
            self.log("eval", {**result.numbers, **({"alarms": signs} if signs else {})})
            self.log("eval_prompts", result.per_prompt)
            samples.save_samples(self.folder, state.iteration, result)
        state.evaluated = state.iteration
        if state.best_reward is None or reward > state.best_reward:
            state.best_reward, state.best_iteration = reward, state.iteration
            if self.recipe.checkpoint.keep_best:
                self.checkpoints.save_best(state, self._write_weights, engine.barrier)

    def _signs(self, result: Evaluation) -> dict[str, float]:
        """The signs of exploited rewards and credit at an evaluation; a warning of those that are
        alarms now and never were before. Of pictures, of judges that have a direction, and of
        clean estimates in the last iterations: none where there is none of these."""
        rows = records.read(self.folder / "eval.jsonl")
        begun = {"iteration": self.state.iteration, **result.numbers}
        first, found = rows[0] if rows else begun, dict[str, float]()
        if result.samples_PN.dtype == torch.uint8:
            images_PN = result.samples_PN.numpy()
            start = samples.kept(self.folder, first["iteration"], images_PN.shape)
            found = alarms.signs(images_PN, start if rows else images_PN)
        found |= alarms.partings(first, begun, result.better)
        found |= alarms.estimates(records.read(self.folder / "metrics.jsonl"))
        for told in alarms.crossings(rows, {**begun, "alarms": found}):
            warnings.warn(told, stacklevel=2)
        return found

    def owes_checkpoint(self) -> bool:
        """Whether this state is to be saved."""
        iteration = self.state.iteration
        return (
            iteration % self.recipe.checkpoint.every == 0 or iteration == self.recipe.run.iterations
        )

    def save(self) -> None:
        """Write a complete checkpoint, if this state is not saved yet."""

        def write(folder: Path) -> None:
            self.trained.save(folder)
            self._write_weights(folder)

        if self.saved == self.state.iteration:
            return
        if self.logs:
            self.logs.sync()
        self.checkpoints.save(self.state, write, engine.barrier)
        self.saved = self.state.iteration

    def close(self, *, failed: bool) -> None:
        """The run is over, or stops here and may continue."""
        if self.logs:
            self.logs.close(failed=failed)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the context the policy carries its averaged weights, if it keeps any."""
        return self.ema.applied() if self.ema else nullcontext()

    def _write_weights(self, folder: Path) -> None:
        """Every rank's part in writing the (averaged) weights; the stock pipeline loads `model`."""
        with self.averaged(), self.trained.exporting():
            averages = self.trained.masters.whole() if self.ema else {}
            if self.main:
                self.backbone.save(folder / "model")
                if averages:
                    save_file(averages, folder / "ema.safetensors")
