"""What does it cost to go on on other ranks, or at another ZeRO stage? Prints the table (CPU).

    python -m benchmarks.trainer.moving [layers]    8 layers are 57 M parameters

All weights of the embedded model's transformer class, scaled up, are trained for a step and saved
in bf16; new engines then load them, from files that are not in the system's cache. Of the rank that
took most: seconds, megabytes of its share (12 bytes an element), megabytes that came from the disk,
and the peak of memory above what it took before. Mapped files count in that peak while they are
read, though the system may drop them; on a CPU the optimiser keeps what was read.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainer.memory import megabytes, transformer, velocity
from tests.support import ranks

MOVES = [
    ((2, 2), (2, 2)), ((2, 1), (2, 2)), ((2, 2), (2, 1)),
    ((3, 2), (3, 2)), ((3, 1), (3, 2)), ((3, 2), (3, 1)),
    ((2, 2), (3, 2)), ((3, 2), (2, 1)),
]  # fmt: skip
"""(ZeRO stage, ranks) that saved, and that go on; as many at the same stage is DeepSpeed's own
loading."""


def built(stage: int, layers: int) -> tuple[Any, int]:
    """A new engine, and the number of its parameters."""
    from sfgrpo import config, engine

    torch.set_num_threads(1)
    engine.start()
    keys = {"deepspeed.zero_stage": str(stage), "lora": "null", "model.dtype": "bf16"}
    network = transformer(layers).bfloat16()
    size = sum(parameter.numel() for parameter in network.parameters())
    recipe = config.load("embedded", list(keys.items()))
    return engine.Engine(network, recipe, micro_batches=1), size


def save(argument: tuple[int, int, Path]) -> None:
    """Take a step and save."""
    stage, layers, folder = argument
    trained, _ = built(stage, layers)
    trained.backward(velocity(trained.network, torch.bfloat16).float().square().mean())
    folder.mkdir(exist_ok=True)
    trained.save(folder)


def load(argument: tuple[int, int, Path, int, int]) -> tuple[float, float, float, float]:
    """Load what so many ranks saved at a stage; returns what the table tells."""
    from sfgrpo import engine

    stage, layers, folder, old, world = argument
    trained, size = built(stage, layers)
    for path in (folder / "engine").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    engine.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, read, start = megabytes("VmRSS"), _from_disk(), time.perf_counter()
    if (old, world) == (stage, engine.world()):
        trained.load(folder)
    else:
        trained.load_anew(folder, stage=old, world=world)
    seconds = time.perf_counter() - start
    share = 12 * size / engine.world() / 2**20
    return seconds, share, _from_disk() - read, megabytes("VmHWM") - before


def _from_disk() -> float:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes")) / 2**20


def main() -> None:
    """Print the table."""
    # glibc keeps what was freed once it has seen larger blocks freed; give all of it back instead.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print("| saved at stage, ranks | go on at | seconds | share, MB | from disk, MB | peak, MB |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory(dir=".") as name:
        for stage, world in sorted({saved for saved, _ in MOVES}):
            argument = (stage, layers, Path(name) / f"{stage} {world}")
            ranks.run("benchmarks.trainer.moving:save", world, argument, timeout=900)
        for (old, saved), (stage, world) in MOVES:
            argument = (stage, layers, Path(name) / f"{old} {saved}", old, saved)
            results = ranks.run("benchmarks.trainer.moving:load", world, argument, timeout=900)
            seconds, *rest = (max(column) for column in zip(*results, strict=True))
            cells = [f"{old}, {saved}", f"{stage}, {world}", f"{seconds:.1f}"]
            print(f"| {' | '.join([*cells, *(f'{m:.0f}' for m in rest)])} |", flush=True)


if __name__ == "__main__":
    importlib.import_module("benchmarks.trainer.moving").main()
