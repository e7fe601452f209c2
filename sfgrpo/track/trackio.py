"""Trackio. Runs lie in its own database (TRACKIO_DIR), all of a project together; `trackio show`
draws them. With `space_id` they go to a Space of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trackio

from sfgrpo.track.base import PROJECT, TrackedRun


class _Run:
    def __init__(self, run: Any) -> None:  # a trackio.Run, which the package does not export
        self._run = run

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=iteration)

    def finish(self, *, failed: bool) -> None:
        self._run.finish()


def start(
    run: TrackedRun, *, project: str = PROJECT, space_id: str | None = None,
    group: str | None = None,
) -> _Run:  # fmt: skip
    """Track a run; arguments as trackio's `init`."""
    return _Run(
        trackio.init(
            # Runs continue by their name, which others in the project may have, too.
            name=f"{run.name}-{run.id[:8]}", resume="allow", config=dict(run.config),
            project=project, space_id=space_id, group=group, embed=False,
        )
    )  # fmt: skip
