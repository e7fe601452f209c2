"""Draws the README's figure of a run of the table, from the JSON that the run wrote.

Command: ``python -m benchmarks.ops.figure benchmarks/results/ops_<device>.json --out figure.png``.

One panel per op, one group of bars per shape, one bar per implementation.  A bar's length is how
fast the op moves the bytes that it must move, relative to a plain copy of as many bytes; at the
right stands how many times faster ours (``sfgrpo``) is than the published form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from benchmarks.ops.shapes import FP32, LATENTS
from benchmarks.ops.table import COMPILE, HAND, IN_PLACE, OURS, PEERS
from sfgrpo.report.plots import INK, MUTED, plt

PANELS = (
    ("sde_step", "forward", "sde_step: sample, noise, log-density"),
    ("sde_logprob", "forward+backward", "sde_logprob, forward and backward"),
    ("policy_loss", "forward+backward", "policy_loss, forward and backward"),
    ("tweedie", "forward", "tweedie: clean estimate"),
)

COLOURS = {
    PEERS: "#c9ced6",
    HAND: "#8b95a3",
    COMPILE: "#e69f00",
    OURS: "#0072b2",
    IN_PLACE: "#003f66",
}
"""Orange and blues of Okabe and Ito beside greys: apart in lightness, too."""

WIDTH, HEIGHT, DPI = 8.0, 8.2, 200
"""Inches; at 200 dots each, half size is 800 pixels wide."""

BAR = 0.16

Cells = Mapping[tuple[str, str, str, str], Mapping[str, Any]]
"""(op, direction, shape, implementation) -> entry, of one dtype."""


def _label(entry: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    times = published["p50_us"] / entry["p50_us"]
    return f"{times:.0f}×" if times >= 9.95 else f"{times:.1f}×"


def _panel(axes: Axes, cells: Cells, op: str, direction: str, title: str) -> None:
    names = [
        name for name in COLOURS if any((op, direction, s.name, name) in cells for s in LATENTS)
    ]
    for place, shape in enumerate(LATENTS):
        for position, name in enumerate(names):
            entry = cells.get((op, direction, shape.name, name))
            if entry is None:
                continue
            y = place + BAR * (position - (len(names) - 1) / 2)
            axes.barh(y, entry["of_copy"], 0.92 * BAR, color=COLOURS[name], zorder=2)
        ours, peers = (cells.get((op, direction, shape.name, name)) for name in (OURS, PEERS))
        if ours and peers:
            axes.text(
                0.99,
                place,
                _label(ours, peers),
                transform=axes.get_yaxis_transform(),  # x in shares of the panel's width
                ha="right",
                va="center",
                fontsize=9.5,
                fontweight="bold",
                color=COLOURS[OURS],
            )
    axes.axvline(1.0, color=MUTED, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_title(title, fontsize=9.5)
    axes.set_yticks(range(len(LATENTS)), [shape.name for shape in LATENTS], fontsize=8.5, color=INK)
    axes.set_ylim(len(LATENTS) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def draw(results: Mapping[str, Any], out: Path) -> None:
    """Draw what ``benchmarks.ops.record`` wrote.

    Raises:
        ValueError: ``results`` holds none of the figure's entries.
    """
    entries: Sequence[Mapping[str, Any]] = results["entries"]
    cells = {
        (e["op"], e["direction"], e["shape"], e["implementation"]): e
        for e in entries
        if e["dtype"] == FP32.name
    }
    shown = [e["of_copy"] for key, e in cells.items() if key[:2] in {panel[:2] for panel in PANELS}]
    if not shown:
        raise ValueError("none of the figure's entries is in this file")
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH, HEIGHT), sharex=True, sharey=True)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        _panel(axes, cells, *panel)
    grid[0, 0].set_xlim(0, 1.2 * max(1.0, *shown))  # room for the numbers
    used = [name for name in COLOURS if any(key[3] == name for key in cells)]
    handles = [Patch(color=COLOURS[name]) for name in used]
    figure.legend(handles, used, loc="outside upper center", ncols=len(used), fontsize=8.5)
    machine = results["machine"]
    where = machine["device"]
    if machine["device"].startswith(machine["cpu"]):
        where += f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    figure.supxlabel(
        f"bandwidth relative to a plain copy of the bytes that must be moved ({where}, fp32)\n"
        f"at the right: how many times faster {OURS} is than {PEERS}; dashed: the copy",
        fontsize=8.5,
        color=INK,
    )
    figure.savefig(out, dpi=DPI)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.figure", description=__doc__)
    parser.add_argument("results", type=Path, help="benchmarks/results/ops_<device>.json")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
