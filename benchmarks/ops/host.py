"""Prints what a call costs the host, whatever it computes: ``python -m benchmarks.ops.host``.

Each contender of a row is called on the CPU with operands of a few numbers, so that checks,
dispatch, allocations and autograd are all that takes time.  On a GPU they run ahead of the device
and are hidden until the kernels are shorter.  Contenders take turns of two calls, of which the
first is not timed: longer ones would seldom fit a slice of a busy processor.  The quantiles are
over the rounds.

Forward and backward include an autograd node that stands for the network, but for the closed forms
by hand, which ask for no gradient; beside them stands what PyTorch takes for a loss that is a node
of its own and does nothing (``FLOOR``).  ``torch.compile`` is left out: it would compile each form
a second time.

``pytest --benchmark-only`` measures the same and writes it beside the times of its entries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import machine
from benchmarks.ops.measure import quantiles
from benchmarks.ops.shapes import FP32, REWARDS, Shape
from benchmarks.ops.table import BY_TITLE, COMPILE, HAND, IN_PLACE, OURS, PEERS, ROWS, Entry, Row
from benchmarks.ops.verify import runner, with_gradient
from sfgrpo import files

FEW = Shape("2 x 8", 2, (8,))
FEW_REWARDS = Shape("2 x 3 x 5", 2, (3, 5))
FLOOR = "a node that does nothing"
CONTENDERS = (PEERS, HAND, OURS, IN_PLACE, FLOOR)

ROUNDS = 200
Quantiles = tuple[float, float, float]
"""0.2, 0.5 and 0.8; microseconds of a call."""


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.zeros = torch.zeros_like(v)
        return v.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.zeros


def _nothing(o: Any) -> tuple[Tensor]:
    result: Any = _Nothing.apply(o.v)
    return (result,)


def _runs(row: Row) -> dict[str, Callable[[], object]]:
    """The contenders of a row, checked and warm."""
    cpu, shape = torch.device("cpu"), FEW_REWARDS if row.shapes is REWARDS else FEW
    runs: dict[str, Callable[[], object]] = {
        name: runner(Entry(row=row, shape=shape, precision=FP32, implementation=name), cpu)
        for name in row.calls
        if name != COMPILE
    }
    if row.backward:
        given, call = row.operands(shape, FP32, cpu), with_gradient(_nothing)
        runs[FLOOR] = lambda: call(given)
    return runs


@cache
def host_us(title: str, rounds: int = ROUNDS) -> dict[str, Quantiles]:
    """Contender of a row -> what a call takes this machine's CPU; measured once in a process."""
    runs = _runs(BY_TITLE[title])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: _tenths(values) for name, values in times.items()}


def _tenths(values: list[float]) -> Quantiles:
    low, middle, high = quantiles(values)
    return round(low, 1), round(middle, 1), round(high, 1)


def table(results: dict[str, dict[str, Quantiles]]) -> str:
    """Row title -> contenders, as lines of text: the median, and the other two in brackets."""
    width = max(map(len, results))
    lines = [f"{'microseconds':{width}}" + "".join(f"{name:>28}" for name in CONTENDERS)]
    for title, found in results.items():
        cells = (
            "{1:.1f} ({0:.1f} to {2:.1f})".format(*found[name]) if name in found else "-"
            for name in CONTENDERS
        )
        lines.append(f"{title:{width}}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def save(path: Path, rounds: int, results: dict[str, dict[str, Quantiles]]) -> None:
    head = {
        "what": "host time of a call on the CPU with operands of 2 x 8 (rewards 2 x 3 x 5)",
        "command": f"python -m benchmarks.ops.host --rounds {rounds}",
        **machine.describe(),
    }
    lines = ",\n".join(
        "  " + json.dumps({"row": title, "p20_p50_p80_us": found})
        for title, found in results.items()
    )
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    files.write(path, f'{opening},\n "results": [\n{lines}\n ]\n}}\n')


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="also save what was measured in this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {row.title: host_us(row.title, options.rounds) for row in ROWS}
    print(table(results))
    if options.json:
        save(options.json, options.rounds, results)


if __name__ == "__main__":
    main(sys.argv[1:])
