"""What an iteration takes if rewards are computed beside the next estimates, and if they are not:

    python -m benchmarks.trainer.overlap [--iterations 6] [--json FILE] [--train.beta 0 ...]

Two runs of the embedded recipe take turns, iteration by iteration, so that whatever else the
machine does meets both; they do the same work on the same samples. A reward of one's own can be
given as in any recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from sfgrpo import config, files
from sfgrpo.arguments import apart
from sfgrpo.run.clock import Clock
from sfgrpo.run.stopping import Signals
from sfgrpo.trainer import Trainer

AHEAD = (0, 2)


def iterated(trainer: Trainer) -> tuple[float, dict[str, float]]:
    """Seconds of an iteration, and where they went; what another thread computed is "beside"."""
    clock, start = Clock(), time.perf_counter()
    trainer.iterate(clock, Signals())
    trainer.progress.state.iteration += 1
    return time.perf_counter() - start, {**clock.seconds, "beside": sum(clock.others.values())}


def main() -> None:
    """Measure and print; keep the numbers where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer.overlap", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, default=6, help="of each (default: 6)")
    parser.add_argument("--json", type=Path, help="file to write")
    given = apart(sys.argv[1:], valued=["--iterations", "--json"])
    options = parser.parse_args(given.options)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainers = {
            ahead: Trainer(
                config.load(
                    "embedded",
                    [
                        ("run.output_dir", f"{folder}/{ahead}"),
                        ("reward_ahead", str(ahead)),
                        *given.pairs,
                    ],
                )
            )
            for ahead in AHEAD
        }
        seconds: dict[int, list[float]] = {ahead: [] for ahead in AHEAD}
        phases: dict[int, list[dict[str, float]]] = {ahead: [] for ahead in AHEAD}
        for turn in tqdm(range(options.iterations + 1), unit="turn"):
            for ahead, trainer in trainers.items():
                took, where = iterated(trainer)
                if turn:  # the first one warms up
                    seconds[ahead].append(took)
                    phases[ahead].append(where)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "iterations": options.iterations}
    for ahead in AHEAD:
        where = {
            name: statistics.median(p[name] for p in phases[ahead]) for name in phases[ahead][0]
        }
        told = ", ".join(f"{name} {value:.2f}" for name, value in where.items() if value > 0.005)
        print(f"reward_ahead {ahead}: {statistics.median(seconds[ahead]):.2f} s ({told})")
        found[f"ahead {ahead}"] = {"seconds": seconds[ahead], "median of phases": where}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    found["ratio of pairs"] = {"least": low, "median": middle, "most": high}
    print(f"ratio of pairs: {middle:.2f} ({low:.2f} to {high:.2f})")
    if options.json:
        files.write(options.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
