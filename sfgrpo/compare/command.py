"""`sfgrpo compare GRID.yaml`: train, then table, summary and figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfgrpo import files
from sfgrpo.compare import grid, runs, table
from sfgrpo.compare.statistics import LEVEL, least_p
from sfgrpo.compare.summary import summarise
from sfgrpo.compare.table import AXES
from sfgrpo.config import check_functions


def main(path: Path, *, train: bool = True) -> int:
    """Compare the grid in a file; returns the exit status: 1 if a run failed, 128 + its number if a
    signal stopped the work. Without `train` what is there is compared.

    Raises:
        ValueError: the grid cannot be run, or there is nothing to compare yet.
    """
    asked, failed = grid.read(path), {}
    if train:
        for run in asked.runs[: len(asked.variants)]:  # the first seed's: the others' are the same
            try:
                check_functions(run.recipe)
            except ValueError as error:
                raise ValueError(f"'{path}': variants.{run.variant}: {error}") from error
        over = sum(map(runs.finished, asked.runs))
        print(f"'{asked.output_dir}': {over} of {len(asked.runs)} runs are finished")
        try:
            failed = runs.train(asked)
        except runs.Stopped as stop:
            print(
                f"sfgrpo compare: {stop}; the runs are saved, and the same command continues",
                file=sys.stderr,
            )
            return stop.status
    print(results(asked))
    for name, why in failed.items():
        print(f"sfgrpo compare: {name} {why}", file=sys.stderr)
    return 1 if failed else 0


def results(asked: grid.Grid) -> str:
    """Write table.csv, summary.json and the figures; returns the summary in text.

    Raises:
        ValueError: there is nothing to compare yet.
    """
    from sfgrpo.compare import figures

    measured = table.measured(asked.runs)
    if not measured:
        raise ValueError(f"no run in '{asked.output_dir}' has an evaluation yet")
    summary = summarise(measured, reference=asked.compared, metric=asked.metric, target=asked.reach)
    table.write(asked.output_dir / "table.csv", measured)
    files.write(asked.output_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    groups = {name: [r for r in measured if r.variant == name] for name in asked.variants}
    paths = figures.draw(
        asked.output_dir, {name: found for name, found in groups.items() if found},
        metric=asked.metric, goal=summary["reach"],
    )  # fmt: skip
    lacking = {axis: why for run in reversed(measured) for axis, why in run.missing.items()}
    lines = [f"no axis of {AXES[axis]}: {why}" for axis, why in lacking.items()]
    written = [asked.output_dir / "table.csv", asked.output_dir / "summary.json", *paths]
    return "\n".join([text(summary), *lines, *map(str, written)])


def text(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    metric, reference = summary["metric"], summary["reference"]
    lines = [f"median over seeds [{LEVEL:.0%} interval]"]
    for name, found in summary["variants"].items():
        against = "" if name == reference else f", paired with '{reference}'"
        there = f"{len(found['finished'])} of {len(found['seeds'])} runs finished"
        lines.append(f"{name}: {there}{against}")
        for other in sorted(found["end"], key=lambda other: other != metric):
            end = found["end"][other]
            if end["median"] is not None:  # some run has come to its end
                told = _paired("difference", end["difference"], "+")
                lines.append(f"  {other} at the end: {_interval(end, 3)}{told}")
        for axis, way in found["to_reach"].items():
            needed = _interval(way, 1 if axis == "iteration" else 0)
            lines.append(
                f"  {AXES[axis]} to {metric} {summary['reach']:.3f}: {needed}, "
                f"{way['reached']} of {way['of']} runs{_paired('ratio', way['ratio'])}"
            )
    return "\n".join(lines)


def _interval(found: Mapping[str, Any], digits: int, sign: str = "") -> str:
    shown = [
        "never" if found[k] is None else f"{found[k]:{sign},.{digits}f}"
        for k in ("median", "low", "high")
    ]
    return "{} [{}, {}]".format(*shown)


def _paired(what: str, found: Mapping[str, Any] | None, sign: str = "") -> str:
    """The difference or the ratio to the reference, its p and the least that p could be."""
    if found is None:
        return ""
    told = f"; {what} {_interval(found, 3, sign)}"
    pairs = found["pairs"]
    if found["p"] is None or pairs < 2:
        return told
    return f"{told}, p {found['p']:.3g} ({pairs} pairs: at least {least_p(pairs):.3g})"
