"""Draws the times of other forms over ours against the size: where the lines cross 1.

Command: ``python -m benchmarks.ops.crossings``, after a complete run of the table on this device;
``make bench`` does both.

One panel per op and direction; below the line at 1 ours is the slower one.  The first point of a
line is a call on a few numbers, what it takes the host (``host_us``); the others are the shapes of
the table, fp32.  Full lines: all threads of the run; dashed: one.  Hollow points stayed disturbed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.ops import machine
from benchmarks.ops.host import FEW, FEW_REWARDS
from benchmarks.ops.record import RESULTS
from benchmarks.ops.shapes import FP32, REWARDS
from benchmarks.ops.table import HAND, OURS, PEERS, ROWS, Row
from sfgrpo.report.plots import MUTED, plt

COLOURS = {PEERS: "#8b95a3", HAND: "#0072b2"}
COLUMNS, WIDTH, HEIGHT, DPI = 2, 8.0, 2.1, 150
"""Panels side by side; inches, of height for each line of panels."""

Line = Mapping[str, Any]
Point = tuple[int, float, bool]
"""(elements, time of the other form over ours, whether one of the two was disturbed)."""

STYLES: dict[str, Literal["-", "--"]] = {"threads": "-", "one_thread": "--"}


def _points(row: Row, lines: Mapping[str, Mapping[str, Line]], other: str) -> Iterator[Point]:
    """Of one style's lines: shape -> implementation -> what was measured."""
    few = FEW_REWARDS if row.shapes is REWARDS else FEW
    for shape in row.shapes:
        found = lines.get(shape.name, {})
        if other not in found or OURS not in found:
            continue
        theirs, ours = found[other], found[OURS]
        if shape is row.shapes[0] and theirs.get("host_us") and ours.get("host_us"):
            yield few.elements, theirs["host_us"][1] / ours["host_us"][1], False
        disturbed = theirs["disturbed"] or ours["disturbed"]
        yield shape.elements, theirs["p50_us"] / ours["p50_us"], disturbed


def lines_of(results: Mapping[str, Any], row: Row, style: str) -> dict[str, dict[str, Line]]:
    """Shape -> implementation -> the line of the file, or its part on one thread."""
    found: dict[str, dict[str, Line]] = {}
    for entry in results["entries"]:
        key = entry["op"], entry["direction"], entry["dtype"]
        speed = entry if style == "threads" else entry.get("one_thread")
        if key == (row.name, row.direction, FP32.name) and speed is not None:
            measured = {**speed, "host_us": entry["host_us"]}
            found.setdefault(entry["shape"], {})[entry["implementation"]] = measured
    return found


def slower(results: Mapping[str, Any]) -> list[str]:
    """Where ours is slower than by hand, in words; what was disturbed is left out."""
    told = []
    for row in ROWS:
        for style in STYLES:
            for elements, ratio, disturbed in _points(row, lines_of(results, row, style), HAND):
                if ratio < 1 and not disturbed:
                    told.append(f"{row.title}, {elements} elements, {style}: {ratio:.2f}")
    return told


def _panel(axes: Axes, row: Row, results: Mapping[str, Any]) -> None:
    for style, drawn in STYLES.items():
        lines = lines_of(results, row, style)
        for other, colour in COLOURS.items():
            points = sorted(_points(row, lines, other))
            if not points:
                continue
            sizes, ratios, disturbed = zip(*points, strict=True)
            axes.plot(sizes, ratios, linestyle=drawn, color=colour, linewidth=1.2)
            for size, ratio, hollow in zip(sizes, ratios, disturbed, strict=True):
                face = "white" if hollow else colour
                axes.plot(size, ratio, "o", color=colour, markersize=4, markerfacecolor=face)
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis, marks in (
        (axes.xaxis, EngFormatter(sep="")),
        (axes.yaxis, StrMethodFormatter("{x:g}")),
    ):
        axis.set_major_formatter(marks)
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(row.title, fontsize=9.5)
    axes.tick_params(labelsize=8)


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Draw what ``benchmarks.ops.record`` wrote.

    Raises:
        ValueError: the file is of a table that knew neither disturbances nor one thread.
    """
    entries: Sequence[Line] = results["entries"]
    if not entries or "disturbed" not in entries[0]:
        raise ValueError("the table has no entries that tell of disturbances; run it anew")
    count = -(-len(ROWS) // COLUMNS)
    figure, grid = plt.subplots(count, COLUMNS, figsize=(WIDTH, HEIGHT * count))
    for axes, row in zip(grid.flat, ROWS, strict=False):
        _panel(axes, row, results)
    for axes in grid.flat[len(ROWS) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    threads = results["machine"]["threads"]
    labels = {"threads": f"threads: {threads}", "one_thread": "one thread"}
    handles += [
        Line2D([], [], color=MUTED, linestyle=drawn, label=labels[style])
        for style, drawn in STYLES.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5)
    figure.supxlabel(f"elements ({results['machine']['device']}, fp32)", fontsize=8.5)
    figure.supylabel(f"times the time of {OURS}", fontsize=8.5)
    figure.savefig(out, dpi=DPI)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    table = RESULTS / f"ops_{machine.slug()}.json"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.crossings", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=table)
    parser.add_argument("--out", type=Path, help="the picture; default: beside the results")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    out = options.out or options.results.with_name(f"{options.results.stem}_crossings.png")
    draw(results, out)
    print(f"wrote {out.name}; ours is slower than {HAND} at:")
    print("\n".join(slower(results)) or "no size that was measured undisturbed")


if __name__ == "__main__":
    main(sys.argv[1:])
