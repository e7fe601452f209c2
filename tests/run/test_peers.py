"""Ranks live and die together: what the others do when one is killed or fails."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from sfgrpo.run.peers import Agreed, Watch

RANK = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from sfgrpo.run.peers import Agreed, Watch

def largest(value):
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)

dist.init_process_group("gloo")
folder, ending, rank = Path(sys.argv[1]), sys.argv[2], dist.get_rank()
with Watch(rank=rank, world=2, largest=largest, timeout=30, folder=folder, interface="127.0.0.1"):
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


@pytest.mark.slow
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


class Pair:
    """Two ranks of one process: their collective, and who is told the port first."""

    def __init__(self, timeout: float = 20) -> None:
        self.values: list[list[int]] = [[], []]
        self.barrier = threading.Barrier(2)
        self.timeout = timeout

    def largest(self, rank: int, value: int) -> int:
        self.values[rank].append(value)
        self.barrier.wait(self.timeout)
        return max(one[len(self.values[rank]) - 1] for one in self.values)

    def watch(self, rank: int, folder: Path) -> Watch:
        return Watch(
            rank=rank, world=2, largest=lambda value: self.largest(rank, value),
            timeout=self.timeout, folder=folder, interface="127.0.0.1",
        )  # fmt: skip


def strangers(port: int, opened: ExitStack) -> None:
    """Connections that are silent, reset, too long, of another tongue, or know everything but the
    secret."""
    sent = (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"x" * 100_000, b"[" * 4000 + b"\n", b"17\n",
            b'{"secret": 1, "rank": 1, "name": "rank 1"}\n')  # fmt: skip
    for message in (b"", b"", *sent):
        connection = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        connection.sendall(message)
    reset = socket.create_connection(("127.0.0.1", port))
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()


def test_what_is_wrong_with_a_recipe_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(
        rank=0, world=2, largest=lambda value: value, timeout=1, folder=tmp_path, interface="",
        told=(ValueError,),
    )  # fmt: skip
    reasons: list[str] = []
    watch.fail = reasons.append  # pyright: ignore[reportAttributeAccessIssue]
    for error in (ValueError("9 trajectories do not divide"), KeyError("x")):
        try:
            raise error
        except (ValueError, KeyError) as raised:
            watch.__exit__(type(raised), raised, None)
        assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)
    assert reasons[0] == f"{watch.name} failed: 9 trajectories do not divide"


def test_strangers_do_not_keep_a_rank_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They connect before rank 1 does."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    pair, ended = Pair(), []
    connect = Watch._connect

    with ExitStack() as opened:

        def late(watch: Watch, secret: int) -> None:
            port = pair.largest(1, 0)
            strangers(port, opened)
            monkeypatch.setattr(watch, "largest", lambda _: port)
            connect(watch, secret)
            monkeypatch.setattr(watch, "largest", lambda value: pair.largest(1, value))

        monkeypatch.setattr(Watch, "_connect", late)

        def other() -> None:
            with pair.watch(1, tmp_path):
                ended.append(1)

        thread = threading.Thread(target=other)
        thread.start()
        with pair.watch(0, tmp_path) as watch:
            assert len(watch.others) == 1
            ended.append(0)
        thread.join(20)
    assert sorted(ended) == [0, 1]


def test_what_all_ranks_refuse_is_no_failure_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    pair = Pair()

    def refuse(rank: int) -> None:
        with pytest.raises(Agreed, match="seeds"), pair.watch(rank, tmp_path):
            raise Agreed("other seeds")

    thread = threading.Thread(target=refuse, args=(1,))
    thread.start()
    refuse(0)
    thread.join(20)
    assert not thread.is_alive()
    assert not list(tmp_path.iterdir())  # no failure.txt


def test_a_rank_that_does_not_connect_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def fail(_: Watch, reason: str) -> None:
        raise Ended(reason)

    monkeypatch.setattr(Watch, "fail", fail)
    watch = Watch(
        rank=0, world=3, largest=lambda value: value, timeout=0.2, folder=tmp_path,
        interface="127.0.0.1",
    )  # fmt: skip
    with pytest.raises(Ended, match=r"1, 2 did not connect to rank 0 \(.*within 0.2 s"), watch:
        pass
