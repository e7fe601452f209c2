"""Each tracker with its real package: offline, without an account, one run over two processes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sfgrpo import config
from sfgrpo.run.tracking import Tracking, starters

NUMBERS = {"metrics/reward": 0.625, "eval/alarms/diversity": 0.5}


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "SWANLAB_API_KEY", "HF_TOKEN", "WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported


def twice(folder: Path, name: str, **options: Any) -> str:
    """Track two iterations, stop, go on with a third; returns the run's id."""
    recipe = config.load(
        "embedded", [("run.track", f"[{name}]"), ("run.track_options", json.dumps({name: options}))]
    )
    for iterations in ([1, 2], [2, 3]):  # the second once more, as after a crash
        run = Tracking(starters(recipe), folder, recipe)
        for iteration in iterations:
            run.log(iteration, NUMBERS)
        run.finish(failed=iterations == [1, 2])
    return (folder / "tracking" / "id").read_text().strip()


@pytest.mark.filterwarnings("error:run.track")
def test_wandb(tmp_path: Path) -> None:
    number = twice(tmp_path, "wandb", project="digits")
    kept = _written(tmp_path / "tracking")
    assert [(run["id"], run["project"]) for run in kept] == [(number, "digits")] * 2
    rows = [row for run in kept for row in run["history"]]
    assert [row["iteration"] for row in rows] == [1, 2, 2, 3]
    assert all(row.items() >= NUMBERS.items() for row in rows)


BLOCK, FULL, LAST = 2**15, 1, 4


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind a header of seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # too little for a header: padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):  # still being written
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def _written(folder: Path) -> list[dict[str, Any]]:
    """The runs below a folder, once wandb's service, a process of its own, has written their ends;
    what there is of them after a minute, if it does not."""
    for _ in range(600):
        found = [_wandb(path) for path in sorted(folder.rglob("run-*.wandb"))]
        if all(run["ended"] for run in found):
            break
        time.sleep(0.1)
    return found


def _wandb(path: Path) -> dict[str, Any]:
    """The run that an offline file holds, and its rows."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # whose classes are made when it is imported

    found: dict[str, Any] = {"history": [], "ended": False}
    for data in _records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        found["ended"] |= record.WhichOneof("record_type") == "exit"
        if record.WhichOneof("record_type") == "run":
            found |= {"id": record.run.run_id, "project": record.run.project}
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found["history"].append(items)
    return found


@pytest.mark.filterwarnings("error:run.track")
def test_trackio(tmp_path: Path) -> None:
    number = twice(tmp_path, "trackio", project="digits")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("digits")
    assert name == f"{tmp_path.name}-{number[:8]}"
    rows: Sequence[Mapping[str, Any]] = SQLiteStorage.get_logs("digits", name)
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    assert all(row.items() >= NUMBERS.items() for row in rows)


@pytest.mark.filterwarnings("error:run.track")
def test_swanlab(tmp_path: Path) -> None:
    number = twice(tmp_path, "swanlab", project="digits")
    kept = sorted((tmp_path / "tracking" / "swanlab").glob(f"run-*-{number}/*.swanlab"))
    assert len(kept) == 2
    for path in kept:
        assert all(name.encode() in path.read_bytes() for name in NUMBERS)
