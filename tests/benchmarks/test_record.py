"""The file of a run of the table: while it grows, complete, resumed, and drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.ops import figure, predictions
from benchmarks.ops.record import Record, named
from benchmarks.ops.table import ENTRIES, OURS, PEERS
from tests.support.entries import measured, tiny

ROOT = Path(__file__).parents[2]


def test_every_entry_is_written_and_a_complete_run_gets_the_name(tmp_path: Path) -> None:
    entries = [tiny("tweedie", OURS), tiny("tweedie", PEERS)]
    record = Record(entries, tmp_path)
    record.add(entries[0], measured(entries[0]))
    (path,) = tmp_path.iterdir()
    assert path == record.partial
    assert len(json.loads(path.read_text())["entries"]) == 1
    told = record.finish()
    assert told.startswith("1 of 2 entries ran")
    assert told.endswith(f"--resume goes on with {entries[1]}")
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
    page = predictions.markdown(results)
    assert page.count("| 2000.0 |") == sum(entry.implementation == OURS for entry in ENTRIES)
    assert "2000.0" not in predictions.markdown(None)
