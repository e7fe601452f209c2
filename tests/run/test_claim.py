"""A run folder is one run's at a time, and the same folder for all its ranks."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from errno import EAGAIN, ENOLCK
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sfgrpo.run import claim
from sfgrpo.run.agreement import Refused
from tests.support import ranks


def claims(folder: Path) -> str:
    """What a run that wants the folder is told."""
    try:
        with claim.claimed(folder):
            return "fine"
    except Refused as error:
        return str(error)


def one_of_two(home: Path) -> dict[str, str]:
    """What a rank is told, case by case."""
    os.chdir(home / f"node {dist.get_rank()}")
    claim.PATIENCE = 0.3
    return {
        "shared": claims(home / "shared"),
        "again": claims(home / "shared"),
        "relative": claims(Path("runs")),
        "held": claims(home / "held"),
        "no folder": claims(home / "file"),
    }


@pytest.mark.slow
def test_two_ranks_are_told_the_same(tmp_path: Path) -> None:
    for name in ("node 0", "node 1"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    with claim.claimed(tmp_path / "held"):
        told, other = ranks.run("tests.run.test_claim:one_of_two", 2, tmp_path)
    assert told == other
    assert told["shared"] == told["again"] == "fine"
    for case, part in (
        ("relative", f"'{tmp_path}/node 1/runs' of rank 1 (on {socket.gethostname()}) is not the"),
        (
            "relative",
            f"folder '{tmp_path}/node 0/runs' of rank 0 (on {socket.gethostname()}): give",
        ),
        ("held", f"is in use by process {os.getpid()} on {socket.gethostname()}, since 20"),
        ("no folder", "cannot be used: File exists"),
    ):
        assert part in told[case]


def hold(folder: Path) -> None:
    with claim.claimed(folder):
        (folder / "held").touch()
        time.sleep(600)


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    run = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    run.start()
    while not (tmp_path / "held").exists():
        assert run.is_alive()
        time.sleep(0.01)
    assert f"in use by process {run.pid} on" in claims(tmp_path)
    run.kill()
    run.join()
    assert claims(tmp_path) == "fine"


def test_where_nothing_was_written_nothing_is_left(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for folder in (tmp_path / "runs" / "a", there):
        assert claims(folder) == "fine"
    assert list(tmp_path.rglob("*")) == [there]
    with claim.claimed(there):
        (there / "recipe.yaml").touch()
    assert (there / "run.lock").exists()


def test_a_file_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder leaves nothing, between the moments when the file is opened and is locked."""
    lockf, path = fcntl.lockf, tmp_path / "run.lock"

    def late(file: Any, how: int) -> None:
        lockf(file, how)
        if removed:
            removed.pop().unlink()

    removed = [path]
    monkeypatch.setattr(fcntl, "lockf", late)
    with claim.claimed(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(number: int) -> Callable[..., Any]:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    monkeypatch.setattr(fcntl, "lockf", lockf(ENOLCK))
    with pytest.warns(UserWarning, match=r"run.lock' cannot be locked \(No locks.*second run"):
        assert claims(tmp_path) == "fine"
    (tmp_path / "run.lock").write_text('{"process": 1')  # its holder has only begun to write
    monkeypatch.setattr(fcntl, "lockf", lockf(EAGAIN))
    assert "in use by another process" in claims(tmp_path)
