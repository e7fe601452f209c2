"""The doctor's report as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfgrpo.doctor.machine import GIB
from sfgrpo.doctor.memory import Setting

if TYPE_CHECKING:
    from sfgrpo.doctor.examination import Report
    from sfgrpo.doctor.twins import Cost


def size(count: int) -> str:
    """Bytes in a unit that suits them."""
    if not count:
        return "-"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def called(s: Setting) -> str:
    """A setting in the words of a table."""
    moved = {"optimiser": s.offload_optimizer, "parameters": s.offload_parameters}
    parts = " and ".join(part for part, there in moved.items() if there)
    return f"ZeRO {s.stage}" + (f", CPU: {parts}" if parts else "")


def as_text(report: Report, *, colour: bool) -> str:
    """The report for people."""

    def paint(code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    lines = []
    for title, facts in report.sections.items():
        width = max(map(len, facts))
        lines += [paint(1, title), *(f"  {name:{width}}  {value}" for name, value in facts.items())]
        if title == "Devices":
            lines += ["", paint(1, "Ops"), *_op_lines(report)]
        if title == "Recipe" and report.memory:
            lines += ["", paint(1, "Memory of one rank"), *_memory_lines(report)]
        if title == "Recipe" and report.cost:
            lines += ["", paint(1, "An iteration on all ranks"), *cost_lines(report.cost)]
        lines.append("")
    for problem in report.problems:
        mark = paint(31, "PROBLEM") if problem.fatal else paint(33, "note")
        lines += [f"{mark}  {problem.what}", f"    -> {problem.remedy}"]
    if report.healthy:
        lines.append(paint(32, "Nothing prevents training."))
    return "\n".join(lines)


def _op_lines(report: Report) -> list[str]:
    lines = []
    for device, checked in report.ops.items():
        for kind in dict.fromkeys(item.backend for item in checked):
            mine = [item for item in checked if item.backend == kind]
            wrong = [item.op for item in mine if not item.good]
            worst = max((item.error for item in mine if item.error is not None), default=0.0)
            verdict = f"WRONG: {', '.join(wrong)}" if wrong else f"within {worst:.0e} of reference"
            lines.append(f"  {device:7}  {kind:9}  {len(mine)} ops, {verdict}")
    return lines


def _memory_lines(report: Report) -> list[str]:
    head = ("", "weights", "gradients", "optimiser", "buckets", "KL, EMA", "on CPU")
    table: list[tuple[str, ...]] = [(*head, "peak, in", "", "with checkpointing, in", "")]
    for row in report.memory:
        h = row.held
        parts = (h.weights, h.gradients, h.optimizer, h.bucket, h.reference + h.ema, h.host)
        table.append(
            (
                f"{'>' if row.chosen else ' '} {called(row.setting)}", *map(size, parts),
                f"{size(row.peak)}, {row.phase}", "fits" if row.fits else "no",
                f"{size(row.checkpointed)}, {row.phase_checkpointed}",
                "fits" if row.fits_checkpointed else "no",
            )
        )  # fmt: skip
    return _aligned(table)


def cost_lines(cost: Cost) -> list[str]:
    """A recipe's cost beside its twin's."""
    head = ("", "velocities", "with gradient", "decoded", "scored", "cost in network rows")
    table: list[tuple[str, ...]] = [head]
    for name, counts in (("  this recipe", cost.recipe), ("  uniform credit", cost.uniform)):
        kinds = ("velocity", "gradient", "decoded", "scored")
        numbers = (*(counts[kind] for kind in kinds), round(cost.rows(counts)))
        table.append((name, *(f"{number:,}" for number in numbers)))
    told = (
        f"  {cost.ratio:.2f} times the cost of uniform credit, where a row with gradient counts "
        f"{cost.gradient} and a sample decoded {cost.decode:.2f}",
        f"  (by {cost.row_flops:.2g} and {cost.decode_flops:.2g} floating-point operations; a "
        "velocity under guidance is two rows; rewards are not in it)",
    )
    finals = cost.recipe.get("scored_final")
    seen = f"  rewards of final images alone see {finals:,} of the samples scored" if finals else ""
    return [*_aligned(table), *filter(None, [seen]), *told]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The columns of a table below each other, numbers to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for line in table
    ]
