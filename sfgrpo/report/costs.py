"""What a run cost, by kind: network rows, samples, seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sfgrpo.report import markup
from sfgrpo.report.look import COLOURS

Log = Sequence[Mapping[str, Any]]

KINDS = {
    "velocity": "velocities without gradient: sampling, clean estimates, reference",
    "gradient": "velocities with gradient, each with its backward pass",
    "decoded": "latents decoded",
    "scored": "samples scored by the rewards",
}
"""Kinds of `cost` in metrics.jsonl."""
PHASES = {
    "estimates": "clean estimates", "decode": "decoding", "train": "training",
    "evaluate": "evaluation", "checkpoint": "checkpoints", "waiting": "waiting for other ranks",
    "communication": "communication between ranks",
}  # fmt: skip
"""How phases of timing.jsonl are called in text."""


def section(metrics: Log, timings: Log) -> str:
    """The section about cost; says what the logs do not hold."""
    counted = [row["cost"] for row in metrics if "cost" in row]
    parts = [_counts(counted)] if counted else []
    if timings:
        parts.append(_seconds(timings))
    lacking = [] if counted else ["This run did not count what it computed."]
    lacking += [] if timings else ["This run kept no timing.jsonl."]
    return markup.section(
        "cost", "Cost",
        "What an iteration computes and where its seconds go, on all ranks together. Under "
        "classifier-free guidance a velocity is two network rows.",
        markup.cards(parts), *(f'<p class="note">{text}</p>' for text in lacking),
    )  # fmt: skip


def _counts(counted: Sequence[Mapping[str, int]]) -> str:
    totals = {kind: sum(row[kind] for row in counted) for kind in KINDS}
    most = max(1, *totals.values())
    rows = [
        [
            KINDS[kind], f"{total / len(counted):,.0f}", f"{total:,}",
            markup.bar(total / most, COLOURS[0]),
        ]
        for kind, total in totals.items()
    ]  # fmt: skip
    head = ["network rows and samples", "an iteration", "the run", ""]
    table = markup.table(head, rows, numbers=(1, 2))
    return f'<div class="card"><h3>What is computed</h3>{table}</div>'


def _seconds(timings: Log) -> str:
    mean, slowest = _phases(timings, "phases"), _phases(timings, "slowest")
    total = sum(mean.values())
    images = sum(row["images_per_second"] for row in timings) / len(timings)
    shown = {phase: value for phase, value in mean.items() if value >= total / 2000}
    rows = [
        [
            f"{markup.dot(place)}{markup.escaped(PHASES.get(phase, phase))}", f"{value:.2f}",
            f"{value / total:.0%}", f"{slowest[phase]:.2f}",
        ]
        for place, (phase, value) in enumerate(shown.items())
    ]  # fmt: skip
    whole = sum(row["seconds"] for row in timings)
    table = markup.table(["phase", "seconds", "share", "slowest rank"], rows, numbers=(1, 2, 3))
    return (
        f'<div class="card"><h3>{total:.1f} seconds an iteration</h3>'
        f"{markup.stack([value / total for value in shown.values()])}{table}"
        f'<p class="note">{duration(whole)} in all, {images:.1f} images a second without '
        "evaluations and checkpoints. Means over iterations and ranks; a rank that others wait "
        "for shows in the last column.</p></div>"
    )


def _phases(timings: Log, kind: str) -> dict[str, float]:
    """Mean seconds of each phase; one that some iterations lack, such as evaluation, counts 0
    there."""
    found: dict[str, float] = defaultdict(float)
    for row in timings:
        for phase, value in row[kind].items():
            found[phase] += value / len(timings)
    return found


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
