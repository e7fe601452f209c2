"""Weights & Biases. Offline runs lie in the run's folder, below tracking/wandb; `wandb sync` there
uploads them. Each time a run continues it gets a folder of its own with the same id."""

from __future__ import annotations

import os
from collections.abc import Mapping

import wandb

from sfgrpo.track.base import PROJECT, TrackedRun


class _Run:
    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        # An axis of our own: wandb drops rows whose step is behind the last one, which those of an
        # iteration that is repeated after a crash are.
        run.define_metric("iteration", hidden=True)
        run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **numbers})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def start(
    run: TrackedRun, *, project: str = PROJECT, entity: str | None = None, mode: str | None = None,
    group: str | None = None, tags: tuple[str, ...] = (),
) -> _Run:  # fmt: skip
    """Track a run; arguments as wandb's `init`. `mode`: WANDB_MODE, else "offline"."""
    return _Run(
        wandb.init(
            id=run.id, name=run.name, resume="allow", dir=run.folder, config=dict(run.config),
            project=project, entity=entity, group=group, tags=list(tags),
            mode=mode or os.environ.get("WANDB_MODE") or "offline",  # pyright: ignore
            # Neither what is printed nor the address of a git remote leaves the machine.
            settings=wandb.Settings(console="off", disable_git=True, silent=True),
        )
    )  # fmt: skip
