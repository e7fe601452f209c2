"""What is kept of a run of the table, and the file it goes to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine
from benchmarks.ops.disturbance import Timed
from benchmarks.ops.measure import quantiles
from benchmarks.ops.table import Entry
from sfgrpo import files

RESULTS = Path(__file__).parents[1] / "results"

FIELDS = {
    "p20_us p50_us p80_us": "quantiles of the time of a call, microseconds",
    "bytes": "that must be read or written at least, without what is per row",
    "gb_per_s": "bytes over the median time",
    "of_copy": "median time of a plain copy that moves as many bytes, over that of the call",
    "peak_bytes": "most memory allocated at a time by a call, results included, operands not",
    "attempts": "how often the entry was timed, because the machine was disturbed",
    "spread": "last quartile of the rounds over the first",
    "copy_slower": "slowest copy beside the entry over the fastest of its size in this table",
    "load": "load average of the last minute, this table's own included",
    "disturbed": "whether even the calmest attempt was (benchmarks.ops.disturbance)",
    "one_thread": "times and disturbance on one thread; none on accelerators, for torch.compile, "
    "and where all is on one thread",
    "host_us": "quantiles .2, .5, .8 of what a call takes the CPU with operands of a few numbers "
    "(benchmarks.ops.host), microseconds; none for torch.compile",
}


def measurements(
    entry: Entry,
    timed: Timed,
    one_thread: Timed | None,
    peak_bytes: int,
    host_us: Sequence[float] | None,
) -> dict[str, Any]:
    """What is told of an entry besides its name: its line of the file, and its ``extra_info``."""
    return {
        **_speed(entry, timed),
        "bytes": entry.bytes,
        "bytes_per_element": entry.row.bytes_per_element(entry.precision),
        "peak_bytes": peak_bytes,
        "host_us": None if host_us is None else list(host_us),
        "one_thread": None if one_thread is None else _speed(entry, one_thread),
        "threads": torch.get_num_threads(),
        "device": machine.device_name(),
    }


def _speed(entry: Entry, timed: Timed) -> dict[str, Any]:
    low, middle, high = quantiles(list(timed.attempt.times))
    return {
        "p20_us": _short(low * 1e6),
        "p50_us": _short(middle * 1e6),
        "p80_us": _short(high * 1e6),
        "rounds": len(timed.attempt.times),
        "gb_per_s": _short(entry.bytes / middle * 1e-9),
        "of_copy": _short(timed.attempt.copy_seconds / middle),
        **timed.record(),
    }


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


@dataclass
class Record:
    """Collects entries, and writes down what it has after each of them.

    An incomplete table has a file of its own beside the device's, ``ops_<device>.partial.json``,
    which the complete one replaces.
    """

    expected: Sequence[Entry]
    folder: Path = RESULTS
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=machine.describe)
    """Of the table's beginning: later, the tree may differ from what was imported."""

    @property
    def path(self) -> Path:
        """Of the complete table."""
        return self.folder / f"ops_{machine.slug()}.json"

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(".partial.json")

    @property
    def missing(self) -> list[str]:
        return [str(entry) for entry in self.expected if str(entry) not in self.found]

    def resume(self) -> None:
        """Take over what an interrupted table has; nothing if there is none.

        Raises:
            ValueError: it was measured at another commit, on another machine, or with other
                versions.
        """
        if not self.partial.exists():
            return
        results = json.loads(self.partial.read_text())
        for key in ("commit", "machine", "versions"):
            if results[key] != self.head[key]:
                raise ValueError(
                    f"{self.partial.name} cannot be resumed: its {key} is {results[key]}, here it "
                    f"is {self.head[key]}; without --resume a new table replaces it"
                )
        known = {tuple(named(entry).values()): str(entry) for entry in self.expected}
        for line in results["entries"]:
            where = tuple(line[key] for key in KEYS)
            self.found[known[where]] = line
        self.head["date"] = results["date"]

    def add(self, entry: Entry, measured: Mapping[str, Any]) -> None:
        told = {k: v for k, v in measured.items() if k not in ("threads", "device")}
        self.found[str(entry)] = named(entry) | told
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(self.partial, self.text())

    @property
    def disturbed(self) -> list[str]:
        """Entries whose times are not to be trusted."""
        on_one = ((name, line["one_thread"] or {}) for name, line in self.found.items())
        return [name for name, line in self.found.items() if line["disturbed"]] + [
            f"{name} (one thread)" for name, speed in on_one if speed.get("disturbed")
        ]

    def finish(self) -> str:
        """Give a complete table its name; what to tell the user."""
        told = self._told()
        if disturbed := self.disturbed:
            told += (
                f"\nbenchmarks: the machine was busy; {len(disturbed)} times stayed disturbed, as "
                f"their lines say: {listing(disturbed)}"
            )
        return told

    def _told(self) -> str:
        if self.missing:
            return (
                f"{len(self.found)} of {len(self.expected)} entries ran, kept in "
                f"{self.folder.name}/{self.partial.name}; --resume goes on with "
                f"{listing(self.missing)}"
            )
        files.write(self.path, self.text())
        self.partial.unlink(missing_ok=True)
        return f"wrote {len(self.found)} entries to {self.folder.name}/{self.path.name}"

    def text(self) -> str:
        """JSON with one line per entry, so that two runs can be compared by ``diff``."""
        head = {"command": "pytest --benchmark-only", **self.head, "fields": FIELDS}
        lines = ",\n".join("  " + json.dumps(entry) for entry in self.found.values())
        opening = json.dumps(head, indent=1).removesuffix("\n}")
        return f'{opening},\n "entries": [\n{lines}\n ]\n}}\n'


KEYS = ("op", "direction", "shape", "dtype", "implementation")
"""What names an entry in the file."""


def named(entry: Entry) -> dict[str, Any]:
    """An entry's name as its line of the file gives it."""
    row = entry.row
    values = (row.name, row.direction, entry.shape.name, entry.precision.name, entry.implementation)
    return dict(zip(KEYS, values, strict=True))


def listing(names: Sequence[str], shown: int = 5) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
