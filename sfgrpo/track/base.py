"""What a run tells a tracker, and what it asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "sfgrpo"
"""The project of runs that name none."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it."""

    name: str
    """The name of the run's folder."""
    id: str
    """21 lower-case letters and digits, the same whenever the run continues."""
    folder: Path
    """Where a tracker may keep files: `tracking` in the run's folder."""
    resumed: bool
    """Whether it continues."""
    config: Mapping[str, Any]
    """The recipe, without what looks like a secret."""


class Tracker(Protocol):
    """A run that is being tracked, on rank 0 alone."""

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers of an iteration. Those of an iteration that a crash took back come once more,
        with the same values."""
        ...

    def finish(self, *, failed: bool) -> None:
        """The run is over, or stops here and may continue later."""
        ...
