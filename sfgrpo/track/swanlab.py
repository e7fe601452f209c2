"""SwanLab. Offline runs lie in the run's folder, below tracking/swanlab; `swanlab sync` uploads
them. Each time a run continues it gets a folder of its own with the same id."""

from __future__ import annotations

import os
from collections.abc import Mapping

import swanlab

from sfgrpo.track.base import PROJECT, TrackedRun


class _Run:
    def __init__(self, run: swanlab.Run) -> None:
        self._run = run

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=iteration)

    def finish(self, *, failed: bool) -> None:
        self._run.finish("crashed" if failed else "success")


def start(
    run: TrackedRun, *, project: str = PROJECT, workspace: str | None = None,
    mode: str | None = None, group: str | None = None, tags: tuple[str, ...] = (),
) -> _Run:  # fmt: skip
    """Track a run; arguments as SwanLab's `init`. `mode`: SWANLAB_MODE, else "offline"."""
    # Neither what is printed nor the address of a git remote leaves the machine.
    settings = swanlab.Settings.model_validate(
        {"interactive": False, "terminal": {"proxy_type": "none"}, "probe": {"git": False}}
    )
    return _Run(
        swanlab.init(
            id=run.id, name=run.name, resume="allow", log_dir=str(run.folder / "swanlab"),
            config=dict(run.config), project=project, workspace=workspace, group=group,
            mode=mode or os.environ.get("SWANLAB_MODE") or "offline",  # pyright: ignore
            tags=list(tags), settings=settings,
        )
    )  # fmt: skip
