"""A run's trackers (`run.track`): started and fed on rank 0, and never a reason to stop.

    tracking/id        the run's id, so that what continues is the same run there
    tracking/...       what offline trackers keep

A package that is missing or a wrong option refuses the run before anything is loaded. Whatever a
tracker raises after that is told once; the run and its other trackers go on without it.
"""

from __future__ import annotations

import os
import re
import secrets
import string
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfgrpo import files
from sfgrpo.config import Recipe
from sfgrpo.names import TRACKER, told
from sfgrpo.track import TrackedRun, Tracker

FOLDER = "tracking"
LETTERS = string.ascii_lowercase + string.digits
ID_LENGTH = 21
"""Letters of an id; SwanLab takes exactly so many."""
SECRET = re.compile(r"(^|[^a-z])((api)?key|token|secret|password|credential)s?$", re.IGNORECASE)
"""Names of keys and environment variables whose values nobody is told."""

Start = Callable[[TrackedRun], Tracker]


def starters(recipe: Recipe) -> dict[str, Start]:
    """How each tracker of a recipe is started.

    Raises:
        ValueError: there is none of this name, its package is missing, or it has no such option.
    """
    options = recipe.run.track_options
    return {name: TRACKER.bind(name, options.get(name)) for name in recipe.run.track}


class Tracking:
    """The trackers of a run."""

    def __init__(self, starters: Mapping[str, Start], folder: Path, recipe: Recipe) -> None:
        self._trackers: dict[str, Tracker] = {}
        if not starters:
            return
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        resumed = (place / "id").is_file()
        if not resumed:
            chosen = "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))
            files.write(place / "id", chosen + "\n")
        run = TrackedRun(
            name=folder.resolve().name, id=(place / "id").read_text(encoding="utf-8").strip(),
            folder=place, resumed=resumed, config=without_secrets(recipe.model_dump(mode="json")),
        )  # fmt: skip
        for name, start in starters.items():
            if tracker := self._attempt(name, lambda start=start: start(run)):
                self._trackers[name] = tracker

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Give all trackers the numbers of an iteration."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(iteration, numbers))

    def finish(self, *, failed: bool) -> None:
        """Tell all trackers that the run is over, or stops here."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, lambda tracker=tracker: tracker.finish(failed=failed))
        self._trackers.clear()

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What a tracker returns; None if it raises, and then it is called no more."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # a tracker raises what it likes
            self._trackers.pop(name, None)
            why = without_values(f"{type(error).__name__}: {told(error)}")
            warnings.warn(
                f"run.track: '{name}' failed and gets nothing more of this run, which goes on: "
                f"{why}",
                stacklevel=3,
            )
            return None


def without_secrets(value: Any, key: str = "") -> Any:
    """A recipe whose values under names such as "api_key" or "token" are hidden."""
    if isinstance(value, dict):
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [without_secrets(entry, key) for entry in value]
    return "***" if SECRET.search(key) and isinstance(value, str) else value


def without_values(text: str) -> str:
    """A message without the values of environment variables that hold secrets."""
    for name, value in os.environ.items():
        if len(value) >= 6 and SECRET.search(name):
            text = text.replace(value, "***")
    return text
