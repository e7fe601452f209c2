"""Training the runs of a grid, some at a time, each in a process of its own.

A run is `python -m sfgrpo.train FOLDER.yaml`; what it prints goes to FOLDER.log. Runs continue by
themselves, so nothing is kept here of who did what: a run is over when its folder says so. Asked to
stop (Ctrl-C, SIGTERM, SIGHUP), the runs are asked, too, and save.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from sfgrpo import files
from sfgrpo.compare.grid import Grid, Run
from sfgrpo.cores import cores
from sfgrpo.names import shortened, unknown_name
from sfgrpo.run import lock, records

POLL = 0.25
"""Seconds between two looks at the processes."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Command = Callable[[Path], list[str]]


class Stopped(Exception):
    """The comparison was asked to stop, and all runs have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def command(recipe: Path) -> list[str]:
    """The process of a run."""
    return [sys.executable, "-m", "sfgrpo.train", str(recipe)]


def iterations(run: Run) -> int:
    """Finished iterations in its log."""
    path = run.folder / "metrics.jsonl"
    return min(path.read_bytes().count(b"\n"), run.iterations) if path.exists() else 0


def finished(run: Run) -> bool:
    """Whether the last state is saved and evaluated."""
    saved = records.newest(run.folder)
    if saved is None or saved < run.iterations:
        return False
    evaluated = {row["iteration"] for row in records.read(run.folder / "eval.jsonl")}
    return run.iterations in evaluated


def check(runs: Sequence[Run]) -> None:
    """Whether each folder is free for its run.

    Raises:
        ValueError: one holds the run of another recipe; names the keys.
    """
    for run in runs:
        try:
            changed = records.differences(run.folder, run.recipe)
        except records.RunError as error:
            raise ValueError(str(error)) from None
        if changed and records.begun(run.folder):
            raise ValueError(
                f"'{run.folder}' holds a run of another recipe ({', '.join(changed)}); choose "
                "another output_dir, or remove the folder"
            )


def train(grid: Grid, command: Command = command) -> dict[str, str]:
    """Train what is not finished; returns the runs that failed, by name, and why.

    Raises:
        ValueError: a folder holds the run of another recipe, or another comparison is at work here.
        Stopped: a signal came.
    """
    runs = grid.runs
    with ExitStack() as held, _signals() as received:
        path = grid.output_dir / "compare.lock"
        if problem := lock.take(path, secrets.token_hex(16), held, key="output_dir"):
            raise ValueError(problem)
        check(runs)
        pool = _Pool(runs, grid.at_once, command)
        bar, looked = held.enter_context(_bar(runs)), False
        while pool.going or (pool.waiting and not received):
            if received:
                pool.stop(len(received))
            else:
                pool.start()
            time.sleep(POLL)
            pool.collect(failing=not received)
            bar.set_postfix_str(", ".join(run.name for run in (*pool.going, *pool.others)), False)
            bar.update(sum(map(iterations, runs)) - bar.n)
            looked = looked or _looked_for_metric(grid)
        if received:
            raise Stopped(received[0])
    return pool.failed


def _looked_for_metric(grid: Grid) -> bool:
    """Say once if evaluations lack the grid's metric, whose names only they tell: at the first one,
    hours before the summary asks for it. False as long as there is none."""
    logs = (records.read(run.folder / "eval.jsonl") for run in grid.runs)
    first = next((rows[0] for rows in logs if rows), None)
    if first is not None and grid.metric not in first:
        what = unknown_name("metric", grid.metric, sorted(first.keys() - {"iteration", "alarms"}))
        tqdm.write(f"sfgrpo compare: {what}; change it while the runs go on", file=sys.stderr)
    return first is not None


class _Pool:
    """The processes of runs, at most so many at a time."""

    def __init__(self, runs: Sequence[Run], at_once: int, command: Command) -> None:
        self.waiting = [run for run in runs if not finished(run)]
        self.others: list[Run] = []
        self.going: dict[Run, subprocess.Popen[bytes]] = {}
        self.failed: dict[str, str] = {}
        self.at_once, self.command, self.told = at_once, command, 0
        # Of all runs, not of those that are left: seconds of one that was continued compare, too.
        share = threads(min(at_once, len(runs)))
        self.environment = {"OMP_NUM_THREADS": str(share), **os.environ}

    def start(self) -> None:
        """Start what there is room for. A run that somebody else trains, such as a process that a
        killed comparison left behind, takes a place and is waited for."""
        self.others = [run for run in self.waiting if lock.holder(run.folder / lock.NAME)]
        for run in [run for run in self.waiting if run not in self.others]:
            if len(self.going) + len(self.others) >= self.at_once:
                return
            self.waiting.remove(run)
            if not finished(run):  # one that was waited for may be
                self.going[run] = _start(run, self.command, self.environment)

    def collect(self, *, failing: bool) -> None:
        """Take away the processes that have ended; `failing` ones have failed."""
        for run, process in list(self.going.items()):
            if process.poll() is not None:
                del self.going[run]
                if process.returncode and failing:
                    self.failed[run.name] = _why(run, process.returncode)
                    tqdm.write(f"{run.name} {self.failed[run.name]}", file=sys.stderr)

    def stop(self, signals: int) -> None:
        """Pass so many signals on: a run that gets its second one ends without saving."""
        for _ in range(self.told, signals):
            for process in self.going.values():
                process.terminate()
        self.told = signals


def threads(at_once: int) -> int:
    """Cores for each of so many processes."""
    return max(1, cores() // max(1, at_once))


def _bar(runs: Sequence[Run]) -> tqdm:
    """Iterations of all runs; its rate, and so its ETA, is that of what is trained now. In a log,
    where each time it is drawn is a line, it is drawn once a minute."""
    return tqdm(
        total=sum(run.iterations for run in runs), initial=sum(map(iterations, runs)), unit="it",
        smoothing=0.1, desc=f"{len(runs)} runs", dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 60, maxinterval=60,
    )  # fmt: skip


def _start(run: Run, command: Command, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    recipe = _beside(run, "yaml")
    # JSON is YAML in which no text can be taken for a number.
    files.write(recipe, json.dumps(run.recipe.model_dump(mode="json"), indent=1) + "\n")
    with _beside(run, "log").open("ab") as log:
        return subprocess.Popen(
            command(recipe), env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _beside(run: Run, ending: str) -> Path:
    return run.folder.with_name(f"{run.folder.name}.{ending}")


def _why(run: Run, status: int) -> str:
    """The last line of its log. Progress bars end in a carriage return."""
    log = _beside(run, "log")
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"ended with {how} ({shortened(last)}); see '{log}'"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the context signals that ask to stop are collected."""
    received: list[int] = []
    former = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in former.items():
        if handler != signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
