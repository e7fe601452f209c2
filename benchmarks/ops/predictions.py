"""Predicted times on GPUs, beside an empty column for measured ones.

``python -m benchmarks.ops.predictions`` writes ``benchmarks/results/gpu_predictions.md``;
``--measured benchmarks/results/ops_<device>.json`` fills the column, as
far as the table got (``.partial.json``), and says what it lacks.  The prediction of ours is

    time     = stages x gap + sums x sum + max(memory, issue, multiply)
    memory   = bytes that must be moved / copy bandwidth
    issue    = elements x instructions per element / (processors x 128 x clock)
    multiply = elements x integer multiplications per element / (processors x 32 x clock)

all kernels but those that draw noise being bound by memory.  A row of the table above its
prediction by much says where to look; one below it says that a number here is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ops.record import KEYS, RESULTS, listing, named
from benchmarks.ops.shapes import Precision, Shape
from benchmarks.ops.table import ENTRIES, OURS, Row
from sfgrpo import files

LANES = 128
"""Instructions a processor issues per clock: four warps of 32 threads."""

MULTIPLIES = 32
"""32-bit integer multiplications per processor and clock.  CUDA's programming guide gives 64 for
compute capability 9.0; the high half of a product is assumed to take twice as long, and half of
Philox's are of that kind, so this is on the safe side."""

GAP = 2e-6
"""Seconds a stage takes beyond its traffic, when the host is ahead: start, first access, end."""

SUM = 0.1e-6
"""Seconds of a sum over a program's threads that others wait for: five shuffles within each warp,
then shared memory, a barrier and shared memory again, some 180 clocks."""

TILE = 1024
"""Elements of a row per program (``kernels/common.py``)."""


@dataclass(frozen=True)
class Chip:
    """Figures of a GPU; bandwidth is what a copy reaches, about nine tenths of the data sheet."""

    name: str
    copy_bandwidth: float
    processors: int = 132
    clock: float = 1.755e9
    """Hz, sustained; the data sheet's boost is 1.98e9."""


CHIPS = (Chip("H100", 3.0e12), Chip("H200", 4.3e12))
"""The SXM modules: 3.35 and 4.8 TB/s by the data sheet."""


@dataclass(frozen=True)
class Cost:
    """What a row costs besides its bytes."""

    stages: int
    """Kernels, PyTorch's included, and sums in a kernel that wait for all of its programs."""

    long_rows: int = 0
    """Further such sums where a row is longer than a tile."""

    sums: int = 0
    """Within a program, one after the other, in kernels too small to hide them."""

    instructions: float = 0.0
    """Per element, where arithmetic may matter: in the kernel's machine code for sm_90, as
    ``python -m sfgrpo.kernels.aot`` counts them."""

    multiplications: float = 0.0
    """Integer ones per element.  Philox4x32-10: ten rounds of two 32 x 32 -> 64 bit products, each
    a low and a high half, for four numbers: 10 x 2 x 2 / 4."""


COSTS = {
    "sde_step": Cost(1, 1, instructions=79, multiplications=10),
    "sde_step, noise given": Cost(1, 1),
    "sde_step_x0": Cost(1, 1, instructions=83, multiplications=10),
    "sde_logprob": Cost(1, 1),
    "sde_logprob+backward": Cost(3, 1),  # in between, autograd fills the incoming gradient
    "policy_loss": Cost(2, 1),  # the rows' losses are added up
    "policy_loss+backward": Cost(4, 1),
    "tweedie": Cost(1),
    # Of the gains over trajectories, over steps; of the squares likewise.
    "gain_advantages": Cost(1, sums=4),
    "philox_normal": Cost(1, instructions=59, multiplications=10),
}
"""By the title of a row."""


@dataclass(frozen=True)
class Prediction:
    """Seconds, on one chip."""

    memory: float
    arithmetic: float
    stages: int
    sums: int

    @property
    def total(self) -> float:
        return self.stages * GAP + self.sums * SUM + max(self.memory, self.arithmetic)


def predict(row: Row, shape: Shape, precision: Precision, chip: Chip) -> Prediction:
    cost = COSTS[row.title]
    long = shape.elements // shape.batch > TILE
    per_second = chip.processors * chip.clock
    issue = cost.instructions / (LANES * per_second)
    multiply = cost.multiplications / (MULTIPLIES * per_second)
    return Prediction(
        memory=row.bytes(shape, precision) / chip.copy_bandwidth,
        arithmetic=shape.elements * max(issue, multiply),
        stages=cost.stages + cost.long_rows * long,
        sums=cost.sums,
    )


def _lines(measured: dict[tuple[str, ...], float]) -> Iterator[str]:
    for entry in ENTRIES:
        if entry.implementation != OURS:
            continue
        row, shape, precision = entry.row, entry.shape, entry.precision
        h100, h200 = (predict(row, shape, precision, chip) for chip in CHIPS)
        time = measured.get((row.name, row.direction, shape.name, precision.name))
        cells = (
            row.title,
            shape.name,
            precision.name,
            f"{entry.bytes / 1e6:.2f}",
            f"{1e6 * h100.memory:.1f}",
            f"{1e6 * h100.arithmetic:.1f}" if h100.arithmetic else "",
            str(h100.stages),
            f"{1e6 * h100.total:.1f}",
            f"{1e6 * h200.total:.1f}",
            "" if time is None else f"{time:.1f}",
        )
        yield f"| {' | '.join(cells)} |"


def markdown(results: dict[str, object] | None) -> str:
    """The page; ``results`` is the content of a file that a run of the table wrote."""
    measured: dict[tuple[str, ...], float] = {}
    column = "measured"
    if results is not None:
        entries, machine = results["entries"], results["machine"]
        assert isinstance(entries, list)
        assert isinstance(machine, dict)
        column += f" ({machine['device']})"
        for e in entries:
            if e["implementation"] == OURS:
                measured[e["op"], e["direction"], e["shape"], e["dtype"]] = e["p50_us"]
    head = (
        "op", "shape", "dtype", "MB", "memory", "arithmetic", "stages", "H100", "H200", column
    )  # fmt: skip
    chips = "; ".join(
        f"{c.name}: {c.copy_bandwidth / 1e12:.1f} TB/s, {c.processors} x {c.clock / 1e9:.3f} GHz"
        for c in CHIPS
    )
    return "\n".join(
        (
            "# The ops on GPUs: predicted, and measured where it has been",
            "",
            "Written by `python -m benchmarks.ops.predictions`, whose text gives the formula and",
            "where its numbers come from. Microseconds; memory and arithmetic are the H100's; each",
            f"stage adds {1e6 * GAP:.0f}, and each of the four sums over a program's threads that",
            f"gain_advantages waits for {1e6 * SUM:.1f}. {chips}.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * 3}{'---:|' * (len(head) - 3)}",
            *_lines(measured),
            "",
        )
    )


def missing(results: dict[str, Any]) -> list[str]:
    """Entries of ours that an incomplete table lacks."""
    there = {tuple(entry[key] for key in KEYS) for entry in results["entries"]}
    wanted = [entry for entry in ENTRIES if entry.implementation == OURS]
    return [str(entry) for entry in wanted if tuple(named(entry).values()) not in there]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.predictions", description=__doc__
    )
    parser.add_argument("--measured", type=Path, help="JSON of a run on a GPU, complete or not")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_predictions.md")
    options = parser.parse_args(arguments)
    results = json.loads(options.measured.read_text()) if options.measured else None
    files.write(options.out, markdown(results))
    if results and (lacking := missing(results)):
        print(f"{options.measured} lacks {len(lacking)} entries: {listing(lacking)}")


if __name__ == "__main__":
    main(sys.argv[1:])
