"""Hashes of all bytes, that are not computed twice and never outlive a change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfgrpo import files, hashes
from sfgrpo.embeddings import fingerprint

YEAR_2020 = 1_577_836_800 * 10**9


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline folder of which one file is larger than a block."""
    monkeypatch.setattr(files, "BLOCK", 64)
    (tmp_path / "pipeline" / "text_encoder").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "text_encoder" / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path / "pipeline"


def weights(folder: Path) -> Path:
    return folder / "text_encoder" / "model.safetensors"


def test_every_byte_counts(folder: Path) -> None:
    found = [fingerprint(folder)]
    for place in range(0, 1000, 37):
        data = bytearray(1000)
        data[place] = 1
        weights(folder).write_bytes(data)
        found.append(fingerprint(folder))
    weights(folder).write_bytes(bytes(1001))
    found.append(fingerprint(folder))
    weights(folder).rename(folder / "text_encoder" / "other.safetensors")
    found.append(fingerprint(folder))
    assert len(set(found)) == len(found)


def test_a_file_is_read_once_while_it_stays_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 0)
    read: list[str] = []
    real = files.sha256
    monkeypatch.setattr(
        files, "sha256", lambda path, bar: read.append(path.name) or real(path, bar)
    )
    first = fingerprint(folder, tmp_path / "memory")
    assert fingerprint(folder, tmp_path / "memory") == first == fingerprint(folder)
    assert sorted(read) == sorted(["model_index.json", "model.safetensors"] * 2)
    read.clear()
    data = bytearray(1000)
    data[500] = 1
    weights(folder).write_bytes(data)
    os.utime(weights(folder), ns=(YEAR_2020, YEAR_2020))
    changed = fingerprint(folder, tmp_path / "memory")
    assert read == ["model.safetensors"]
    assert changed != first
    weights(folder).write_bytes(bytes(1000))  # size and time of change are those of before, now
    os.utime(weights(folder), ns=(YEAR_2020, YEAR_2020))
    assert fingerprint(folder, tmp_path / "memory") == first


def test_what_just_changed_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    """It may change again within a tick of the file system's clock."""
    fingerprint(folder, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_long_work_is_shown_with_its_bytes(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(hashes, "SLOW", 1000)
    fingerprint(folder)
    assert "hashing text encoders: 100%" in (told := capsys.readouterr().err)
    assert "1.00k/1.00k" in told


def test_a_cache_that_cannot_be_written_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 0)
    (tmp_path / "memory").write_text("a file, no folder")
    with pytest.warns(UserWarning, match=r"memory' cannot be written .*hashes 'model"):
        found = fingerprint(folder, tmp_path / "memory")
    assert found == fingerprint(folder)
