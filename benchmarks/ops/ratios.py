"""Prints ratios of ops to other forms of themselves: ``python -m benchmarks.ops.ratios [row ...]``.

Contenders take turns, so that whatever else the machine does hits all of them alike.  A turn is a
few calls and counts as its fastest: the first ones pay for the memory and caches that the other
contender left behind.  A ratio is taken within a round, quantiles over the rounds.  A plain copy
of the bytes that the op must move is a contender like any other.

At the end stand the numbers that the project claims (``CLAIMS``), as far as their rows were run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine
from benchmarks.ops.measure import copier, device, peak_memory, quantiles, seconds
from benchmarks.ops.shapes import BF16, FP32, LATENTS, REWARDS, Precision, Shape
from benchmarks.ops.table import BY_TITLE, COMPILE, OURS, PEERS, Entry, Row
from benchmarks.ops.verify import runner

CALLS_PER_TURN = 5
COPY = "copy"


@dataclass(frozen=True)
class Claim:
    """The ratio of ours to one contender of a row."""

    row: str
    other: str
    what: str
    memory: bool = False

    def text(self, result: Result) -> str:
        if self.memory:
            share = result.peak_bytes[OURS] / result.peak_bytes[self.other]
            return f"{share:.3f}  {self.what}"
        low, middle, high = quantiles(result.ratios(self.other, OURS))
        return f"{middle:.2f}  (p20 {low:.2f}, p80 {high:.2f})  {self.what}"


CLAIMS = (
    Claim("sde_step", PEERS, "times faster than peers' eager: sde_step"),
    Claim("policy_loss+backward", PEERS, "times faster than peers' eager: policy_loss+backward"),
    Claim("sde_step, noise given", COMPILE, "times faster than torch.compile: noise given"),
    Claim("tweedie", COPY, "of the copy's bandwidth: tweedie"),
    Claim("sde_logprob", COPY, "of the copy's bandwidth: sde_logprob, forward"),
    Claim("policy_loss+backward", PEERS, "of eager autograd's peak memory", memory=True),
)


@dataclass(frozen=True)
class Result:
    """What was measured of a row: per contender the seconds of every round, and peak bytes."""

    row: Row
    threads: int
    times: dict[str, list[float]]
    peak_bytes: dict[str, int]

    def ratios(self, above: str, below: str) -> list[float]:
        pairs = zip(self.times[above], self.times[below], strict=True)
        return [a / b for a, b in pairs]

    def text(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        lines = [
            f"\n{self.row.title}, {device().type}, {threads}; milliseconds",
            f"  {'':17} {'fastest':>9} {'p20':>9} {'p50':>9} {'p80':>9} {'peak MB':>9}"
            "   times faster (p20 p50 p80)",
        ]
        for name, values in self.times.items():
            numbers = "".join(f"{1e3 * value:10.3f}" for value in (min(values), *quantiles(values)))
            line = f"  {name:17}{numbers} {self.peak_bytes[name] / 1e6:9.2f}   "
            ratios = quantiles(self.ratios(PEERS, name))
            lines.append(line + " ".join(f"{ratio:5.1f}" for ratio in ratios))
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        us = {
            n: [round(1e6 * t, 2) for t in (min(v), *quantiles(v))] for n, v in self.times.items()
        }
        ratio = {n: [round(r, 3) for r in quantiles(self.ratios(n, OURS))] for n in self.times}
        return {
            "row": self.row.title,
            "threads": self.threads,
            "fastest_p20_p50_p80_us": us,
            "over_sfgrpo_p20_p50_p80": ratio,
            "peak_bytes": self.peak_bytes,
        }


def measure(row: Row, shape: Shape, precision: Precision, threads: int, rounds: int) -> Result:
    torch.set_num_threads(threads)
    runs: dict[str, Any] = {}
    for name in row.calls:
        entry = Entry(row=row, shape=shape, precision=precision, implementation=name)
        runs[name] = runner(entry, device())
    runs[COPY] = copier(row.bytes(shape, precision))
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = {name: peak_memory(run) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(min(seconds(run) for _ in range(CALLS_PER_TURN)))
    return Result(row, threads, times, peaks)


def claims(results: list[Result]) -> list[str]:
    return [
        f"{result.threads} thread{'s' * (result.threads > 1)}: {claim.text(result)}"
        for claim in CLAIMS
        for result in results
        if result.row.title == claim.row
    ]


def save(path: Path, options: argparse.Namespace, results: list[Result]) -> None:
    head = {
        "what": f"{options.shape}, {options.dtype}; a copy moves the bytes the op must move",
        "command": " ".join(["python -m benchmarks.ops.ratios", *map(repr, options.rows)]),
        "rounds": options.rounds,
        **machine.describe(),
        "claims": claims(results),
    }
    del head["machine"]["threads"]  # each result says its own
    lines = ",\n".join("  " + json.dumps(result.record()) for result in results)
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{opening},\n "results": [\n{lines}\n ]\n}}\n')


def _options(arguments: list[str]) -> argparse.Namespace:
    shapes = [shape.name for shape in (*LATENTS, *REWARDS)]
    claimed = list(dict.fromkeys(claim.row for claim in CLAIMS))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.ratios", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {list(BY_TITLE)}")
    parser.add_argument("--shape", default=None, choices=shapes, help="default: SD3.5 512px")
    parser.add_argument("--dtype", default=FP32.name, choices=[FP32.name, BF16.name])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also save what was measured in this file")
    options = parser.parse_args(arguments)
    unknown = set(options.rows) - set(BY_TITLE)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}, expected some of {list(BY_TITLE)}")
    options.rows = options.rows or claimed
    rewards = [BY_TITLE[row].shapes is REWARDS for row in options.rows]
    options.shape = options.shape or (REWARDS if all(rewards) else LATENTS)[0].name
    wrong = [r for r in options.rows if options.shape not in {s.name for s in BY_TITLE[r].shapes}]
    if wrong:
        parser.error(f"{options.shape} is no shape of {wrong}")
    return options


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    shape = next(shape for shape in (*LATENTS, *REWARDS) if shape.name == options.shape)
    precision = FP32 if options.dtype == FP32.name else BF16
    results = []
    print(f"{shape.name}: {' x '.join(map(str, shape.size))}, {precision.name}")
    # Elsewhere the host's threads do nothing that is measured.
    for threads in options.threads if device().type == "cpu" else options.threads[:1]:
        for row in options.rows:
            results.append(measure(BY_TITLE[row], shape, precision, threads, options.rounds))
            print(results[-1].text(), flush=True)
    print("\n" + "\n".join(claims(results)))
    if options.json:
        save(options.json, options, results)


if __name__ == "__main__":
    main(sys.argv[1:])
