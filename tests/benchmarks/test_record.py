"""The file of a run of the table: while it grows, complete, resumed, and drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import crossings, figure, measure, predictions
from benchmarks.ops.disturbance import ATTEMPTS, Watch
from benchmarks.ops.record import Record, named
from benchmarks.ops.table import BY_TITLE, ENTRIES, HAND, OURS, PEERS
from tests.support.entries import measured, tiny

ROOT = Path(__file__).parents[2]


def test_every_entry_is_written_and_a_complete_run_gets_the_name(tmp_path: Path) -> None:
    entries = [tiny("tweedie", OURS), tiny("tweedie", PEERS)]
    record = Record(entries, tmp_path)
    record.add(entries[0], measured(entries[0]))
    (path,) = tmp_path.iterdir()
    assert path == record.partial
    assert len(json.loads(path.read_text())["entries"]) == 1
    told, disturbed = record.finish().splitlines()
    assert told.startswith("1 of 2 entries ran")
    assert told.endswith(f"--resume goes on with {entries[1]}")
    assert disturbed.endswith(f"1 times stayed disturbed, as their lines say: {entries[0]}")
    record.add(entries[1], measured(entries[1]))
    record.finish()
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"ops_[a-z0-9_]+\.json", path.name)
    content = json.loads(path.read_text())
    assert {"date", "commit", "machine", "versions", "fields", "entries"} <= set(content)
    first = content["entries"][0]
    assert (first["op"], first["implementation"], first["peak_bytes"]) == ("tweedie", OURS, 7)
    assert (first["p20_us"], first["p50_us"], first["p80_us"]) == (1400, 2000, 3200)
    assert first["of_copy"] == 0.25
    assert (first["spread"], first["copy_slower"], first["load"]) == (2, 1.25, 1.5)
    assert first["disturbed"]
    assert (first["one_thread"]["p50_us"], first["one_thread"]["disturbed"]) == (3000, False)
    assert first["host_us"] == [20, 21, 30]
    assert first["gb_per_s"] == pytest.approx(5 * 30 * 12 / 2e-3 * 1e-9)
    assert str(ROOT) not in path.read_text()


def test_an_interrupted_table_is_resumed(tmp_path: Path) -> None:
    entries = [tiny("policy_loss+backward", OURS), tiny("sde_step, noise given", PEERS)]
    record = Record(entries, tmp_path)
    record.add(entries[0], measured(entries[0]))
    again = Record(entries, tmp_path)
    again.resume()
    assert again.found == record.found
    again.add(entries[1], measured(entries[1]))
    assert not again.missing
    other = Record(entries, tmp_path)
    other.head["commit"] = "another"
    with pytest.raises(ValueError, match=r"its commit is .*, here it is another"):
        other.resume()
    assert not other.found


def test_predictions_say_what_an_incomplete_table_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [entry for entry in ENTRIES if entry.implementation == OURS]
    record = Record(ENTRIES, tmp_path)
    record.add(ours[0], measured(ours[0]))
    page = tmp_path / "page.md"
    predictions.main(["--measured", str(record.partial), "--out", str(page)])
    assert f"lacks {len(ours) - 1} entries: {ours[1]}, " in capsys.readouterr().out
    assert page.read_text().count("| 2000.0 |") == 1


def test_figure_and_predictions_of_a_record(tmp_path: Path) -> None:
    record = Record(ENTRIES, tmp_path)
    record.found = {str(entry): named(entry) | measured(entry) for entry in ENTRIES}
    results = json.loads(record.text())
    figure.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="none of the figure's entries"):
        figure.draw({"entries": []}, tmp_path / "empty.png")
    crossings.draw(results, tmp_path / "crossings.png")
    assert (tmp_path / "crossings.png").stat().st_size > 20_000
    page = predictions.markdown(results)
    assert page.count("| 2000.0 |") == sum(entry.implementation == OURS for entry in ENTRIES)
    assert "2000.0" not in predictions.markdown(None)


def _table(**us: float) -> dict[str, Any]:
    """A table of the clean estimate at one shape, on all threads; medians by name."""
    names = {"hand": HAND, "ours": OURS}
    entries = [entry for entry in ENTRIES if entry.row is BY_TITLE["tweedie"]]
    shape = entries[-1].shape
    lines = []
    for entry in entries:
        for name, implementation in names.items():
            if (entry.shape, entry.implementation) == (shape, implementation):
                line = named(entry) | measured(entry)
                calm = {"disturbed": us.get("disturbed", 0) > 0, "one_thread": None}
                lines.append(line | calm | {"p50_us": us[name]})
    return {"entries": lines, "machine": {"device": "a processor", "threads": 2}}


def test_where_ours_is_slower_is_told_unless_it_was_disturbed(tmp_path: Path) -> None:
    (told,) = crossings.slower(_table(hand=3.0, ours=4.0))
    assert told.startswith("tweedie, ")
    assert told.endswith(" elements, threads: 0.75")
    assert not crossings.slower(_table(hand=4.0, ours=3.0))
    assert not crossings.slower(_table(hand=3.0, ours=4.0, disturbed=1.0))
    with pytest.raises(ValueError, match="run it anew"):
        crossings.draw({"entries": [{"op": "tweedie"}]}, tmp_path / "old.png")


class Machine:
    """Copies that take what a list says, and rounds, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, copies: list[float]) -> None:
        self.copies, self.asked = iter(copies), 0
        monkeypatch.setattr(measure, "copy_seconds", lambda number_of_bytes: next(self.copies))

    def rounds(self, *times: list[float]) -> Callable[[], list[float]]:
        def next_rounds() -> list[float]:
            self.asked += 1
            return times[min(self.asked, len(times)) - 1]

        return next_rounds


CALM, SCATTERED = [1.0, 1.0, 1.1], [1.0, 2.0, 3.0]


def test_what_was_calm_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Machine(monkeypatch, [1.0, 1.1])
    timed = Watch().timed(8, busy.rounds(CALM))
    assert (busy.asked, timed.attempts, timed.disturbed) == (1, 1, False)


def test_scattered_rounds_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Machine(monkeypatch, [1.0] * 4)
    timed = Watch().timed(8, busy.rounds(SCATTERED, CALM))
    assert (busy.asked, timed.attempts, timed.disturbed) == (2, 2, False)
    assert timed.attempt.times == CALM


def test_a_slow_machine_shows_in_the_copy_however_even_the_rounds_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = Machine(monkeypatch, [1.0] * 2 + [5.0, 5.0, 4.0, 4.0, 6.0, 6.0] + [5.0] * 6)
    watch = Watch()
    watch.timed(8, busy.rounds(CALM))
    timed = watch.timed(8, busy.rounds(CALM))
    assert (timed.attempts, timed.disturbed) == (ATTEMPTS, True)
    assert timed.attempt.slower == 4  # the calmest of three
    other = watch.timed(16, busy.rounds(CALM))
    assert not other.disturbed  # nothing is known of copies of another size
