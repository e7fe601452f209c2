"""A run's logs and images -> one self-contained report.html, and a short summary in text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfgrpo.report import costs, glance, hacking, logs, look, markup, sections
from sfgrpo.run.records import read

Log = Sequence[Mapping[str, Any]]


def numbers(log: Log) -> list[str]:
    """The names of the numbers that every line of a log has."""
    names = [name for name in log[0] if name != "iteration"]
    return [name for name in names if all(isinstance(row.get(name), int | float) for row in log)]


def summary(folder: Path) -> str:
    """Before and after on held-out noise, as a table in text."""
    evaluations = read(folder / "eval.jsonl")
    first, last = evaluations[0], evaluations[-1]
    lines = [f"held-out noise         before    after   (iteration {last['iteration']})"]
    for name in numbers(evaluations):
        lines.append(f"  {name:<20}{first[name]:>7.3f}{last[name]:>9.3f}")
    return "\n".join(lines)


def write(folder: Path, *, beside: str = "") -> str:
    """Write `folder/report.html`; returns the summary and where the report is. `beside` are links
    to other runs.

    Raises:
        ValueError: the folder holds no finished iteration.
    """
    metrics, evaluations = logs.rows(folder, "metrics"), logs.rows(folder, "eval")
    recipe, rule = logs.recipe(folder)
    names = numbers(evaluations)
    parts = [
        glance.section(folder),
        sections.images(folder, evaluations),
        sections.credit(metrics, evaluations),
        sections.judges(evaluations, [name for name in names if name != "reward"]),
        hacking.section(evaluations),
        sections.health(metrics, sections.clip_range(folder)),
        costs.section(metrics, read(folder / "timing.jsonl")),
        sections.recipe(recipe),
    ]
    head = _head(folder, metrics, evaluations, rule, names).replace("<nav></nav>", _links(parts))
    path = folder / "report.html"
    look.write_page(path, f"sfgrpo: {folder.name}", beside + head + "".join(parts))
    return f"{summary(folder)}\nreport: {path}"


def _head(folder: Path, metrics: Log, evaluations: Log, rule: str, names: Sequence[str]) -> str:
    """What run it is, and what it came to."""
    first, last = evaluations[0], evaluations[-1]
    return (
        f'<p class="kicker">{markup.escaped(rule)} credit</p>'
        f"<h1>{markup.escaped(folder.name)}</h1>"
        f'<p class="lead">{metrics[-1]["iteration"]} iterations of GRPO on a flow-matching model. '
        "The numbers in these tiles were measured on noise that training never draws.</p>"
        "<nav></nav>"
        f"{markup.tiles({k: first[k] for k in names}, {k: last[k] for k in names})}\n"
    )


def _links(parts: Sequence[str]) -> str:
    """To the sections that there are."""
    found = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(parts))
    return "<nav>" + "".join(f'<a href="#{name}">{title}</a>' for name, title in found) + "</nav>"
