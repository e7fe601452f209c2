"""Ranks live and die together: what the others do when one is killed or fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from sfgrpo.run.peers import Watch

def largest(value):
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)

dist.init_process_group("gloo")
folder, ending, rank = Path(sys.argv[1]), sys.argv[2], dist.get_rank()
with Watch(rank=rank, world=2, largest=largest, timeout=30, folder=folder):
    (folder / f"ready{rank}").touch()
    if ending == "error" and rank == 1:
        raise ArithmeticError("the reward is a pumpkin")
    if ending == "well":
        sys.exit() if largest(rank) != 1 else print("done")
    elif rank == 1:
        time.sleep(600)  # busy for longer than any test
    else:
        largest(1)
dist.destroy_process_group()
"""


def start(folder: Path, ending: str, port: int) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), ending],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_ranks_end_together_and_say_why(tmp_path: Path) -> None:
    """Killed ranks, failing ranks, and ranks that end well, all at once to save time."""
    endings = ("kill 0", "kill 1", "error", "well")
    runs = {e: start(tmp_path / e, e, 29621 + k) for k, e in enumerate(endings)}
    for name in ("kill 0", "kill 1"):
        while len(list((tmp_path / name).glob("ready*"))) < 2:
            assert all(process.poll() is None for process in runs[name])
            time.sleep(0.05)
        runs[name][int(name[-1])].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = {e: [p.communicate(timeout=60)[0] for p in runs[e]] for e in endings}
    assert time.monotonic() - killed < 25  # far below gloo's half an hour; the machine may be busy
    assert "rank 0 (on 127.0.0.1) died without a word" in outputs["kill 0"][1]
    assert f"rank 1 (process {runs['kill 1'][1].pid} on " in outputs["kill 1"][0]
    assert "died without a word" in outputs["kill 1"][0]
    assert "Traceback" in outputs["error"][1]
    assert "failed: ArithmeticError: the reward is a pumpkin" in outputs["error"][0]
    assert "pumpkin" in (tmp_path / "error" / "failure.txt").read_text()
    statuses = {e: [p.returncode for p in runs[e]] for e in endings}
    assert statuses == {"kill 0": [-9, 1], "kill 1": [1, -9], "error": [1, 1], "well": [0, 0]}
    assert outputs["well"] == ["done\n", "done\n"]
