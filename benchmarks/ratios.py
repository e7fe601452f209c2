"""Prints how many times faster than published code each op runs: ``python -m benchmarks.ratios``.

Contenders take turns, so that whatever else the machine does hits all of them alike.  A turn is a
few calls and counts as its fastest: the first ones pay for the memory and caches that the other
contender left behind.  A ratio is taken within a round, quantiles over the rounds.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.table import TABLE, copy_seconds, device, operands, runner

CALLS_PER_TURN = 5


def measure(op: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Contender -> seconds per call in each round; "copy" moves the same bytes."""
    torch.set_num_threads(threads)
    o = operands(device())
    runs = {name: runner(TABLE[op], name, o) for name in TABLE[op].contenders}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            turn = []
            for _ in range(CALLS_PER_TURN):
                start = time.perf_counter()
                run()
                turn.append(time.perf_counter() - start)
            seconds[name].append(min(turn))
    seconds["copy"] = [copy_seconds(TABLE[op].traffic(o), device())]
    return seconds


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 0.2, 0.5 and 0.8 quantiles."""
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, middle, high


def report(op: str, threads: int, rounds: int) -> None:
    seconds = measure(op, threads, rounds)
    print(f"\n{op}, {device().type}, {threads} thread{'s' * (threads > 1)}")
    print(f"  {'':10} {'fastest':>9} {'p20':>9} {'p50':>9} {'p80':>9}   times faster (p20 p50 p80)")
    baseline = seconds["published"]
    for name, values in seconds.items():
        low, middle, high = quantiles(values)
        line = "".join(f"{1e3 * value:9.3f} " for value in (min(values), low, middle, high))
        if name != "copy":
            ratios = quantiles([b / t for b, t in zip(baseline, values, strict=True)])
            fastest = min(baseline) / min(values)
            line += "  " + " ".join(f"{r:5.1f}" for r in ratios) + f"   fastest {fastest:5.1f}"
        print(f"  {name:10}{line}  ms" if name == "copy" else f"  {name:10}{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(TABLE), metavar="op", help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    unknown = set(options.ops) - set(TABLE)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}, expected some of {list(TABLE)}")
    for op in options.ops:
        for threads in options.threads if device().type == "cpu" else options.threads[:1]:
            report(op, threads, options.rounds)


if __name__ == "__main__":
    main()
