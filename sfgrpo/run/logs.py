"""A run's logs: lines of JSON that are appended to; their numbers for TensorBoard and trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sfgrpo import files
from sfgrpo.run.records import LOGS, read
from sfgrpo.run.tracking import Tracking


class Logs:
    """Appends to a run's logs and mirrors numbers to TensorBoard and the run's trackers."""

    def __init__(self, folder: Path, start: int | None, tracking: Tracking) -> None:
        """Continue the logs of `folder` after iteration `start`, dropping what came later; None
        drops everything."""
        self.folder, last = folder, -1 if start is None else start
        for name in LOGS:
            kept = [row for row in read(folder / name) if row["iteration"] <= last]
            files.write(folder / name, "".join(json.dumps(row) + "\n" for row in kept))
        self.tracking = tracking
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, log: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Append one line to `<log>.jsonl`."""
        with (self.folder / f"{log}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        numbers = dict(scalars(log, values))
        for name, number in numbers.items():
            self.board.add_scalar(name, number, iteration)
        if numbers:
            self.tracking.log(iteration, numbers)

    def sync(self) -> None:
        """Have every line on the disk: a checkpoint counts on those before it."""
        for name in LOGS:
            if (self.folder / name).exists():
                files.sync(self.folder / name)

    def close(self, *, failed: bool) -> None:
        """The run is over or stops here."""
        self.board.close()
        self.tracking.finish(failed=failed)


def scalars(log: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, of mappings in it, too, by names such as "eval/alarms/diversity"."""
    for name, value in values.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        for part, number in parts.items():
            if isinstance(number, int | float):
                yield f"{log}/{name}/{part}".strip("/"), number
