"""Whatever asks a run to stop, alone or under a launcher, it stops at a safe point and saves."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from sfgrpo import train
from sfgrpo.run import records, stopping
from sfgrpo.run.stopping import Interrupted, Signals, alive
from sfgrpo.trainer import Trainer
from tests.support import reaching

STEPS = """
import os, sys, time
from pathlib import Path
from sfgrpo import engine
from sfgrpo.run import output
from sfgrpo.run.stopping import Interrupted, Signals

folder = Path(sys.argv[-1])
engine.start()
rank = engine.rank()
with output.lasting(), Signals() as signals:
    try:
        while True:
            signals.check()
            print("a step")
            sys.stdout.flush()
            aside = folder / f"writing{rank}"
            aside.write_text(str(os.getpid()))
            aside.replace(folder / f"pid{rank}")  # never seen empty
            time.sleep(0.1)
    except Interrupted as stop:
        time.sleep(0.5)  # saving takes a while
        engine.barrier()
        (folder / f"saved{rank}").write_text(f"{stop}, {stop.status}")
        engine.barrier()
engine.stop()
"""
"""A run without a network: safe points, and something that is saved."""

PYTHON = (sys.executable, "-u")
PORTS = [str(socket.create_server(("127.0.0.1", 0)).getsockname()[1]) for _ in range(2)]
CASES = {
    "deepspeed, Ctrl-C": (2, ("deepspeed", "--num_gpus", "2", "--master_port", PORTS[0])),
    "deepspeed, SIGTERM": (1, ("deepspeed", "--num_gpus", "1", "--master_port", PORTS[1])),
    "torchrun, Ctrl-C": (1, ("torchrun", "--standalone")),
    "torchrun, SIGTERM": (1, ("torchrun", "--standalone")),
    "alone, SIGHUP": (1, PYTHON),
    "nohup, SIGHUP and SIGTERM": (1, ("nohup", *PYTHON)),
}
"""How many ranks, and what starts them; the signal goes where a user sends it."""
SAVED = {
    "deepspeed, Ctrl-C": ("SIG", "13"),  # whichever arrives first of the terminal's and DeepSpeed's
    "deepspeed, SIGTERM": ("its launcher is gone, 129",),
    "torchrun, Ctrl-C": ("SIGINT, 130",),
    "torchrun, SIGTERM": ("SIGTERM, 143",),
    "alone, SIGHUP": ("SIGHUP, 129",),
    "nohup, SIGHUP and SIGTERM": ("SIGTERM, 143",),
}


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, as in a terminal of its own; its output is read by us. SIGHUP does
    what it does there, also if the tests were started with nohup."""
    environment = {
        **os.environ, "PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        command, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip


def wait(until: Callable[[], object], process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until it comes about; fails with the process's output if that ends or time is up."""
    deadline = time.monotonic() + seconds
    while not until():
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(process.communicate()[0].decode())
        time.sleep(0.05)


def ask(case: str, process: subprocess.Popen[bytes]) -> None:
    """What the user does."""
    if case == "alone, SIGHUP":
        assert process.stdout is not None
        process.stdout.close()  # `| tee` is gone first
        time.sleep(0.5)
        assert process.poll() is None
    if case.startswith("nohup"):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    if case.endswith("Ctrl-C"):
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGHUP if case == "alone, SIGHUP" else signal.SIGTERM)


@pytest.mark.slow
def test_every_launcher_and_signal(tmp_path: Path) -> None:
    """All at once, to save time."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    processes, folders = {}, {case: tmp_path / case for case in CASES}
    for case, (_, launcher) in CASES.items():
        folders[case].mkdir()
        processes[case] = start([*launcher, str(script), str(folders[case])])
    for case, (world, _) in CASES.items():
        wait(lambda f=folders[case], w=world: len(list(f.glob("pid*"))) == w, processes[case], 120)
    ranks = {psutil.Process(int(f.read_text())): f for f in tmp_path.glob("*/pid*")}
    for case, process in processes.items():
        ask(case, process)
    _, left = psutil.wait_procs(ranks, timeout=25)
    left = list(filter(alive, left))  # one that ended may wait for whoever asks after it
    for process in left:
        process.kill()
    assert not left, [(ranks[process].relative_to(tmp_path), process) for process in left]
    for case, (world, _) in CASES.items():
        for rank in range(world):
            said = folders[case] / f"saved{rank}"
            assert said.exists(), (case, rank)
            assert all(part in said.read_text() for part in SAVED[case]), said.read_text()
        processes[case].wait(30)


@pytest.mark.slow
def test_training_under_deepspeed_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C of the terminal; the checkpoint is that of the last iteration that was logged. Until
    then the folder is that run's."""
    folder, path = tmp_path / "run", tmp_path / "recipe.yaml"
    changes = {"run.iterations": "1000", "checkpoint": "{every: 1000}"}
    given = reaching.recipe(tmp_path, lora="null", **changes)
    path.write_text(json.dumps(given.model_dump(mode="json")))
    process = start(
        ["deepspeed", "--num_gpus", "2", "--master_port", "29643", "--module", "sfgrpo.train",
         str(path)]
    )  # fmt: skip
    wait(lambda: records.read(folder / "metrics.jsonl"), process, 200)
    assert train.main([str(path), "--run.iterations", "1"]) == 2
    assert re.search(r"'.*run' is in use by process \d+ on .*, since 20", capsys.readouterr().err)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()  # it ends when the ranks have
    last = records.read(folder / "metrics.jsonl")[-1]["iteration"]
    assert f"after {last} iterations, which are saved" in output
    assert (folder / "checkpoints" / f"{last:06d}" / "manifest.json").exists(), output


def test_one_wish_arrives_as_several_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ended = 100.0, []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    monkeypatch.setattr(stopping.os, "kill", lambda _, number: ended.append(number))
    former = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
            now += 0.5
        with pytest.raises(Interrupted, match="SIGINT") as stop:
            signals.check()
        assert stop.value.status == 130
        assert not ended
        now = 102.1  # two seconds after the first SIGINT, not yet after the first SIGTERM
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == former


def test_launchers_are_told_from_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves a run behind on purpose (a shell, a tool of the night) does not stop it."""
    lines = [
        ["/v/bin/python3.11", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e"],
        ["/v/bin/python", "/v/bin/deepspeed", "--module", "sfgrpo.train"],
        ["/v/bin/python", "/v/bin/torchrun", "-m", "sfgrpo.train"],
        ["bash", "deepspeed"],
        ["/v/bin/python", "-m", "torch.distributed.run"],
    ]

    class Listed(psutil.Process):
        def parents(self) -> list[psutil.Process]:
            return [Line(words) for words in lines]

    class Line(psutil.Process):
        def __init__(self, words: list[str]) -> None:
            super().__init__()
            self.words = words

        def cmdline(self) -> list[str]:
            return self.words

    monkeypatch.setattr(stopping.psutil, "Process", Listed)
    assert len(stopping.launchers()) == 3


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    number: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What logs and pictures meet, which are written where no checkpoint is."""

    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number), "picture")

    path = tmp_path / "recipe.yaml"
    path.write_text(reaching.recipe(tmp_path, lora="null").model_dump_json())
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "finish", full)
        if told:
            assert train.main([str(path)]) == 2
        else:
            with pytest.raises(OSError, match="picture"):
                train.main([str(path)])
    said = capsys.readouterr().err
    assert ("has no room for what the run writes ([Errno 28]" in said) == told
    assert train.main([str(path)]) == 0
