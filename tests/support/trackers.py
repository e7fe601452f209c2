"""Trackers of one's own, as a recipe names them: one that keeps what it is told, some that fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfgrpo.track import TrackedRun

TOLD: list[tuple[Any, ...]] = []
"""What `keeping` was told."""


class Keeping:
    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        TOLD.append(("log", iteration, dict(numbers)))

    def finish(self, *, failed: bool) -> None:
        TOLD.append(("finish", failed))


def keeping(run: TrackedRun, *, project: str = "") -> Keeping:
    TOLD.append(("start", run, project))
    return Keeping()


class Failing(Keeping):
    """Fails in the call named `when`, with the secret it was given."""

    def __init__(self, when: str, secret: str) -> None:
        self.when, self.secret = when, secret
        self.fail("start")

    def fail(self, place: str) -> None:
        TOLD.append((f"failing {place}",))
        if place == self.when:
            raise ConnectionError(f"no answer for the key {self.secret}")

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self.fail("log")

    def finish(self, *, failed: bool) -> None:
        self.fail("finish")


def failing(run: TrackedRun, *, when: str, secret: str = "") -> Failing:
    return Failing(when, secret)


def leaving(run: TrackedRun) -> Keeping:
    raise SystemExit(3)
