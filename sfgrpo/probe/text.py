"""What a probe found, as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfgrpo.probe.findings import Findings, Measured


def as_text(found: Findings) -> str:
    """Tables of steps and of solvers, a line each."""
    which = f"after {found.iteration} iterations" if found.iteration else "before training"
    lines = [
        f"{found.prompts} prompts x {found.group_size} trajectories, {len(found.steps)} steps, "
        f"{found.rule} credit; the policy {which}",
        f"reward {found.reward:.3f}, standard deviation within groups {found.reward_std:.3f}, of "
        f"one image scored again {found.reward_noise:.2g}",
    ]
    if found.dropped_groups:
        lines.append(f"{found.dropped_groups} groups left out: a reward was not finite")
    return "\n".join([*lines, "", *_steps(found), "", *_solvers(found), "", *_windows(found)])


def _steps(found: Findings) -> list[str]:
    """What each step explains, and how well the solvers agree there."""
    shown = [row for row in found.rows if row.chosen] or found.rows[:1]
    table: list[tuple[str, ...]] = [
        (
            "step", "t", "noise", "share of the reward's variance", "mean |gain|",
            *(f"agreement of {row.name}" for row in shown),
        )
    ]  # fmt: skip
    for step in found.steps:
        cells = [f"{step.step}", f"{step.t:.3f}", f"{step.noise:.3f}" if step.noise else "-"]
        cells += [_of(step.share), f"{step.gain:.3f}"]
        table.append((*cells, *(_number(row.per_step[step.step]) for row in shown)))
    return _aligned(table, left=0)


def _solvers(found: Findings) -> list[str]:
    """Agreement against cost."""
    table = [
        ("", "agreement with exact", "rows for estimates", "images scored", "seconds"),
        *(
            (
                f"{'>' if row.chosen else ' '} {row.name}", _of(row.agreement),
                f"{row.evaluations:.1f}", f"{row.images:.1f}", f"{row.seconds:.1f}",
            )
            for row in found.rows
        ),
    ]  # fmt: skip
    return [
        *_aligned(table, left=1),
        f"> the recipe's. Network rows and images are of one trajectory, beside the "
        f"{found.sampling:.1f} rows of",
        "sampling it; seconds are of the estimates of all. Errors are over prompts.",
    ]


def _windows(found: Findings) -> list[str]:
    """What is left with noise in a window of the steps."""
    if not found.windows:
        return []
    head: tuple[str, ...] = (
        "noise in steps", "agreement with exact", "deviation of the reward in groups",
        "rows for sampling", "rows for estimates", "images scored",
    )  # fmt: skip
    table: list[tuple[str, ...]] = [head]
    for row in found.windows:
        numbers = [f"{n:.1f}" for n in (row.sampling, row.evaluations, row.images)]
        place = f"{row.steps[0]} to {row.steps[-1]}"
        table.append((place, _of(row.agreement), f"{row.reward_std:.3f}", *numbers))
    return _aligned(table, left=1)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _of(measured: Measured) -> str:
    if math.isnan(measured.error):
        return _number(measured.value)
    return f"{_number(measured.value)} +- {measured.error:.2f}"


def _aligned(table: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Columns of one width each, the first `left` of them flush left."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
