"""`python -m tests.support.rehearsal.families [NAMES]`: an iteration of each family, small."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.trainer import family_checks
from sfgrpo import engine
from tests.support import families


def main() -> None:
    """See `--help`."""
    parser = argparse.ArgumentParser(
        description="One iteration of each family, small, on a CUDA device that is not there."
    )
    parser.add_argument("names", nargs="*", help="families; all if there are none")
    parser.add_argument("--folder", type=Path, help="holds a saved pipeline of each name")
    parser.add_argument("--zero", nargs="+", default=["0"], help="ZeRO stages")
    parser.add_argument("--out", type=Path, help="keeps the runs, and what was logged as JSON")
    options = parser.parse_args()
    logged: dict[str, dict[str, Any]] = {stage: {} for stage in options.zero}
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        for stage, name in itertools.product(options.zero, options.names or families.FAMILIES):
            began = time.monotonic()
            folder = options.folder or families.save(name, Path(scratch) / name).parent
            _, found = family_checks.train(
                name, folder / name, out / f"{name}-{stage}", deepspeed__zero_stage=stage
            )
            logged[stage][name] = found
            print(f"{name}: reward {found['reward']:.4f}, {time.monotonic() - began:.1f} s")
        if engine.rank() == 0:
            (out / "logged.json").write_text(json.dumps(logged))
        engine.stop()


if __name__ == "__main__":
    main()
