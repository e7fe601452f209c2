"""What a server counts, in Prometheus' text format. Only the event loop writes here."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Counts:
    """Since the server started."""

    reward: str
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    samples: int = 0
    batches: int = 0
    seconds: float = 0.0
    """In the reward."""
    queued: int = 0
    """Requests that are admitted and not yet answered."""
    queued_bytes: int = 0
    began: float | None = None
    """When the batch that is being scored began (monotonic)."""

    def text(self) -> str:
        """The page that Prometheus reads."""
        name = self.reward.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        label = f'{{reward="{name}"}}'
        running = 0.0 if self.began is None else time.monotonic() - self.began
        lines = ["# TYPE sfgrpo_reward_responses_total counter"]
        lines += [
            f'sfgrpo_reward_responses_total{{reward="{name}",path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self.responses.items())
        ]
        for metric, kind, value in (
            ("samples_total", "counter", self.samples),
            ("batches_total", "counter", self.batches),
            ("seconds_total", "counter", round(self.seconds, 6)),
            ("queued_requests", "gauge", self.queued),
            ("queued_bytes", "gauge", self.queued_bytes),
            ("running_seconds", "gauge", round(running, 3)),
        ):
            lines += [
                f"# TYPE sfgrpo_reward_{metric} {kind}", f"sfgrpo_reward_{metric}{label} {value}"
            ]  # fmt: skip
        return "\n".join(lines) + "\n"
