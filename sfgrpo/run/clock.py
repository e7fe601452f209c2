"""Where an iteration's time goes."""

from __future__ import annotations

import time
from typing import Any

import torch

from sfgrpo import engine
from sfgrpo.run.records import BETWEEN


class Clock:
    """Seconds per phase; what was spent on other ranks is not counted with the phase but under
    "communication" and "waiting"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.others: dict[str, float] = {}
        self._spent = engine.spent()
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`."""
        engine.synchronize()
        now, spent = time.perf_counter(), engine.spent()
        elsewhere = {kind: spent[kind] - self._spent[kind] for kind in spent}
        here = now - self._last - sum(elsewhere.values())
        for name, seconds in {phase: here, **elsewhere}.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._last, self._spent = now, spent

    def beside(self, phase: str, seconds: float) -> None:
        """Add what another thread computed meanwhile."""
        self.others[phase] = self.others.get(phase, 0.0) + seconds

    def row(self, images: int, device: torch.device) -> dict[str, Any]:
        """The iteration's line in timing.jsonl (a collective).

        `phases` are means over ranks and add up to `seconds`, `share` is their part of it,
        `slowest` the most any rank spent: a rank that others wait for shows in it. `beside` is what
        other threads computed at the same time, and no part of the sum.
        """
        names, others = list(self.seconds), list(self.others)
        all_of_them = [*self.seconds.values(), *self.others.values()]
        local = torch.tensor([all_of_them], dtype=torch.float64, device=device)
        ranks = engine.gather(local, torch.tensor([engine.rank()], device=device))
        mean, slowest = ranks.mean(0).tolist(), ranks.amax(0).tolist()[: len(names)]
        beside = dict(zip(others, mean[len(names) :], strict=True))
        phases = dict(zip(names, mean[: len(names)], strict=True))
        total = sum(phases.values())
        work = total - sum(phases.get(name, 0.0) for name in BETWEEN)
        return {
            "seconds": round(total, 4),
            "images_per_second": round(images / work, 3),
            "phases": {name: round(seconds, 4) for name, seconds in phases.items()},
            "share": {name: round(seconds / total, 4) for name, seconds in phases.items()},
            "slowest": {n: round(s, 4) for n, s in zip(names, slowest, strict=True)},
            "beside": {name: round(seconds, 4) for name, seconds in beside.items()},
        }
