"""Several ranks on one machine, for tests: start them, collect what they return, end them all.

    results = ranks.run("benchmarks.trainer.parity:work", 2, {"any": "picklable argument"})

calls `work(argument)` in two processes that have joined one gloo group, and returns the two results
in the order of their ranks. PyTorch, diffusers and DeepSpeed take ten seconds to import: a server
imports them once, and every rank is a fork of it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# The second is what DeepSpeed imports when it first builds an engine.
_CONTEXT.set_forkserver_preload(["sfgrpo.trainer", "deepspeed.runtime.zero.muon.muon_optimizer"])
_LOCK = threading.Lock()
"""Starting a process asks after all others: not while another thread does."""
GRACE = 10
"""Seconds that the others have to end in when a rank has failed."""


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
        with _LOCK:
            processes = [_start(target, rank, world, folder) for rank in range(world)]
        try:
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            with _LOCK:
                for process in processes:
                    process.kill()
                    process.join()
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]


def _start(target: str, rank: int, world: int, folder: Path) -> BaseProcess:
    # The server's environment is that of the first call.
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)
    }  # fmt: skip
    process = _CONTEXT.Process(target=_work, args=(target, folder, environment))
    process.start()
    return process


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    """Return when every rank has ended well; one that has not gives the others a moment to end.

    The rank whose peer has gone may end before the peer does: why it all began is in the other's
    output, so that of every rank that failed is shown.
    """
    failed = False
    while True:
        with _LOCK:
            codes = [process.exitcode for process in processes]
        if not failed and any(codes):
            failed, deadline = True, time.monotonic() + GRACE
        if all(code == 0 for code in codes):
            return
        late = time.monotonic() > deadline
        if failed and (late or None not in codes):
            ended = [(rank, code) for rank, code in enumerate(codes) if code]
            tails = (f"rank {r} ended with status {c}:\n{_tail(folder, r)}" for r, c in ended)
            raise RankError("\n".join(tails))
        if late:
            stuck = [rank for rank, code in enumerate(codes) if code is None]
            tails = "\n".join(f"rank {rank}:\n{_tail(folder, rank)}" for rank in stuck)
            raise RankError(f"ranks {stuck} were not done in time\n{tails}")
        time.sleep(0.05)


def _tail(folder: Path, rank: int) -> str:
    lines = (folder / f"output{rank}").read_text(errors="replace").splitlines()
    return "\n".join(lines[-60:])


def _work(target: str, folder: Path, environment: dict[str, str]) -> None:
    """What each process runs: join the group, call, leave the result in `folder`."""
    os.environ.clear()
    os.environ.update(environment)
    with (folder / f"output{environment['RANK']}").open("wb", buffering=0) as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(  # through a file: no port that another program could hold
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )
    module, _, function = target.partition(":")
    argument = pickle.loads((folder / "argument").read_bytes())
    result = getattr(importlib.import_module(module), function)(argument)
    (folder / f"result{environment['RANK']}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
