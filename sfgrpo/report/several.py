"""Several runs: a report of each, and a page that lays their curves over each other."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sfgrpo.report import logs, look, markup, page
from sfgrpo.report.costs import duration
from sfgrpo.report.look import COLOURS
from sfgrpo.report.plots import axes_of, column
from sfgrpo.run.records import BETWEEN, read

Log = Sequence[Mapping[str, Any]]
NAME = "runs.html"
"""The page, in the folder that all runs lie in."""


@dataclass(frozen=True)
class Run:
    """What is compared of a run."""

    folder: Path
    name: str
    """Its folder's, with as much of the path as tells it from the others."""
    evaluations: Log
    seconds: np.ndarray
    """Up to each evaluation, without evaluations and checkpoints; empty if it was not timed."""
    recipe: dict[str, Any]
    """Dotted key -> value."""


def write(folders: Sequence[Path]) -> str:
    """Write the report of each run and the page of all; returns what is told.

    Raises:
        ValueError: a folder that holds no run, or is given twice.
    """
    runs = _runs(folders)
    top = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    path = top / NAME
    for run in runs:
        page.write(run.folder, beside=_links(run.folder, runs, path, skip=run))
    shared = [
        name for name in page.numbers(runs[0].evaluations)
        if all(name in page.numbers(run.evaluations) for run in runs)
    ]  # fmt: skip
    body = (
        f'<p class="kicker">{len(runs)} runs</p><h1>{markup.escaped(top.name)}</h1>'
        '<p class="lead">Measured on noise that training never draws. Each name leads to the '
        f"run's own report.</p>{_table(runs, shared, path)}{_curves(runs, shared)}"
        f"{_differences(runs)}"
    )
    look.write_page(path, f"sfgrpo: {len(runs)} runs", body)
    lines = [f"report: {run.folder / 'report.html'}" for run in runs]
    return "\n".join([*lines, f"runs: {path}"])


def _runs(folders: Sequence[Path]) -> list[Run]:
    places = [folder.resolve() for folder in folders]
    for k, place in enumerate(places):
        if place in places[:k]:
            raise ValueError(f"'{folders[k]}' is given twice")
    # As many parts of the path, from its end, as make all names different.
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    runs = []
    for folder, place in zip(folders, places, strict=True):
        logs.rows(folder, "metrics")  # what is no run is refused before any page is written
        evaluations = logs.rows(folder, "eval")
        runs.append(
            Run(
                folder, "/".join(place.parts[-depth:]), evaluations,
                _seconds(folder, [row["iteration"] for row in evaluations]),
                dict(_flat(logs.parsed(folder))),
            )
        )  # fmt: skip
    return runs


def _seconds(folder: Path, iterations: Sequence[int]) -> np.ndarray:
    """Of training up to each of the iterations."""
    timings = {row["iteration"]: row for row in read(folder / "timing.jsonl")}
    if not timings:
        return np.array([])
    spent = {
        k: row["seconds"] - sum(row["phases"].get(phase, 0.0) for phase in BETWEEN)
        for k, row in timings.items()
    }
    # An iteration that was saved when the run was asked to stop has no line: the usual one.
    usual = float(np.median(list(spent.values())))
    each = [spent.get(k, usual) for k in range(1, max(iterations) + 1)]
    return np.cumsum([0.0, *each])[list(iterations)]


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [
            found for key, inner in value.items() for found in _flat(inner, f"{place}.{key}")
        ]  # fmt: skip
    return [(place.strip("."), value)]


def _link(run: Run, start: Path) -> str:
    """A link from the page `start` to a run's report."""
    target = os.path.relpath(run.folder.resolve() / "report.html", start.resolve().parent)
    return f'<a href="{quote(target)}">{markup.escaped(run.name)}</a>'


def _links(folder: Path, runs: Sequence[Run], everything: Path, *, skip: Run) -> str:
    """What a run's report links to: the page of all, and each other."""
    start = folder / "report.html"
    target = quote(os.path.relpath(everything.resolve(), start.resolve().parent))
    others = [_link(run, start) for run in runs if run is not skip]
    return f'<nav><a href="{target}">all {len(runs)} runs</a> {" ".join(others)}</nav>'


def _table(runs: Sequence[Run], names: Sequence[str], path: Path) -> str:
    rows = []
    for place, run in enumerate(runs):
        last = run.evaluations[-1]
        spent = duration(run.seconds[-1]) if len(run.seconds) else ""
        rule = str(run.recipe.get("credit.rule", ""))
        rows.append(
            [
                f"{markup.dot(place)}{_link(run, path)}", markup.escaped(rule),
                str(last["iteration"]), spent, *(markup.number(last[name]) for name in names),
            ]
        )  # fmt: skip
    head = ["run", "credit", "iterations", "training"]
    head += [markup.escaped(name.replace("_", " ")) for name in names]
    table = markup.table(head, rows, numbers=range(2, len(head)))
    return f'<div class="card"><h3>At the end</h3>{table}</div>'


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    cards = [
        markup.figure(
            _curve(runs, "reward"), "Reward against iterations",
            "Iterations cost different amounts of time where recipes differ.",
        )
    ]  # fmt: skip
    if all(len(run.seconds) for run in runs):
        cards.append(
            markup.figure(
                _curve(runs, "reward", seconds=True),
                "Reward against seconds of training",
                "Without evaluations and checkpoints; comparable if the machine and its load are.",
            )
        )
    others = [
        markup.figure(_curve(runs, name), name.replace("_", " "), "")
        for name in names if name != "reward"
    ]  # fmt: skip
    return markup.section(
        "curves", "Curves", "Colours are those of the table above.",
        markup.cards(cards), markup.cards(others, small=True),
    )  # fmt: skip


def _curve(runs: Sequence[Run], name: str, *, seconds: bool = False) -> Figure:
    figure, axes = axes_of()
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        places, values = column(run.evaluations, name)
        places = run.seconds if seconds else places
        axes.plot(places, values, "o-", color=colour, markersize=3.5)
    axes.set(xlabel="seconds" if seconds else "iteration")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _differences(runs: Sequence[Run]) -> str:
    """The keys in which the recipes differ."""
    keys = sorted({key for run in runs for key in run.recipe} - {"run.output_dir"})
    rows = []
    for key in keys:
        values = [str(run.recipe[key]) if key in run.recipe else "-" for run in runs]
        if len(set(values)) > 1:
            values = [textwrap.shorten(value, 200, placeholder="...") for value in values]
            rows.append([f"<code>{markup.escaped(key)}</code>", *map(markup.escaped, values)])
    if not rows:
        return ""
    head = ["key", *(f"{markup.dot(k)}{markup.escaped(run.name)}" for k, run in enumerate(runs))]
    return markup.section(
        "differences", "What the recipes differ in", "All other keys are the same.",
        f'<div class="card">{markup.table(head, rows, numbers=())}</div>',
    )  # fmt: skip
