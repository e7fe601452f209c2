"""Several ranks on one machine, for tests: start them, collect what they return, end them all.

    results = ranks.run("benchmarks.trainer.parity:work", 2, {"any": "picklable argument"})

calls `work(argument)` in two processes that have joined one gloo group, and returns the two results
in the order of their ranks. Starting a process costs seconds (imports), so one call should do many
cases.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


class RankError(RuntimeError):
    """A rank failed or took too long; the message ends with its output."""


def run(target: str, world: int, argument: Any, *, timeout: float = 240) -> list[Any]:
    """Call the function "module:function" with `argument` on `world` ranks.

    Raises:
        RankError: a rank ended without a result (its traceback is in the message), or not all were
            done after `timeout` seconds. No process is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "argument").write_bytes(pickle.dumps(argument))
        processes = [_start(target, rank, world, folder) for rank in range(world)]
        try:
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]


def _start(target: str, rank: int, world: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    with (folder / f"output{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks", target, str(folder)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY,
        )  # fmt: skip


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    """Return when every rank has ended well; the first that has not ends the waiting."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise RankError(f"rank {rank} ended with status {code}:\n{_tail(folder, rank)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            stuck = [rank for rank, code in enumerate(codes) if code is None]
            tails = "\n".join(f"rank {rank}:\n{_tail(folder, rank)}" for rank in stuck)
            raise RankError(f"ranks {stuck} were not done in time\n{tails}")
        time.sleep(0.05)


def _tail(folder: Path, rank: int) -> str:
    lines = (folder / f"output{rank}").read_text(errors="replace").splitlines()
    return "\n".join(lines[-60:])


def main(target: str, folder: Path) -> None:
    """What each process runs: join the group, call, leave the result in `folder`."""
    import torch.distributed as dist

    dist.init_process_group(  # through a file: no port that another program could hold
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    module, _, function = target.partition(":")
    argument = pickle.loads((folder / "argument").read_bytes())
    result = getattr(importlib.import_module(module), function)(argument)
    (folder / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
