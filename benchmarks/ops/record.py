"""What is kept of a run of the table, and the file it goes to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine
from benchmarks.ops.measure import quantiles
from benchmarks.ops.table import Entry

RESULTS = Path(__file__).parents[1] / "results"

FIELDS = {
    "p20_us p50_us p80_us": "quantiles of the time of a call, microseconds",
    "bytes": "that must be read or written at least, without what is per row",
    "gb_per_s": "bytes over the median time",
    "of_copy": "median time of a plain copy that moves as many bytes, over that of the call",
    "peak_bytes": "most memory allocated at a time by a call, results included, operands not",
}


def measurements(
    entry: Entry, times: list[float], copy_seconds: float, peak_bytes: int
) -> dict[str, Any]:
    """What is told of an entry besides its name: its line of the file, and its ``extra_info``."""
    low, middle, high = quantiles(times)
    return {
        "p20_us": _short(low * 1e6),
        "p50_us": _short(middle * 1e6),
        "p80_us": _short(high * 1e6),
        "rounds": len(times),
        "bytes": entry.bytes,
        "bytes_per_element": entry.row.bytes_per_element(entry.precision),
        "gb_per_s": _short(entry.bytes / middle * 1e-9),
        "of_copy": _short(copy_seconds / middle),
        "peak_bytes": peak_bytes,
        "threads": torch.get_num_threads(),
        "device": machine.device_name(),
    }


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


@dataclass
class Record:
    """Collects entries; a file is written only once all of the table's are there."""

    expected: Sequence[Entry]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, entry: Entry, measured: Mapping[str, Any]) -> None:
        self.found[str(entry)] = {
            "op": entry.row.name,
            "direction": entry.row.direction,
            "shape": entry.shape.name,
            "dtype": entry.precision.name,
            "implementation": entry.implementation,
            **{k: v for k, v in measured.items() if k not in ("threads", "device")},
        }

    def finish(self, folder: Path = RESULTS) -> str:
        """Write the file of this device if the run was complete; what to tell the user."""
        missing = [str(entry) for entry in self.expected if str(entry) not in self.found]
        if missing:
            return (
                f"{len(self.found)} of {len(self.expected)} entries ran, "
                "so no file of results was written"
            )
        path = folder / f"ops_{machine.slug()}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text())
        return f"wrote {len(self.found)} entries to {path.parent.name}/{path.name}"

    def text(self) -> str:
        """JSON with one line per entry, so that two runs can be compared by ``diff``."""
        head = {"command": "pytest --benchmark-only", **machine.describe(), "fields": FIELDS}
        lines = ",\n".join("  " + json.dumps(entry) for entry in self.found.values())
        opening = json.dumps(head, indent=1).removesuffix("\n}")
        return f'{opening},\n "entries": [\n{lines}\n ]\n}}\n'
