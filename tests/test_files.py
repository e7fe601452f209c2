"""Files are whole or not there, whoever writes them, and on the disk before they have a name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sfgrpo import config, files
from sfgrpo.evaluate import Evaluation
from sfgrpo.prompts import Prompt
from sfgrpo.report import plots
from sfgrpo.run import records, samples


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def fail() -> None:
        with files.replacing(path) as aside:
            aside.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
    files.write(path, "nëu\n")
    assert path.read_bytes() == "nëu\n".encode()


def test_the_name_comes_after_the_contents_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor: int) -> None:
        order.append(
            "folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file"
        )
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", renamed)
    files.write(tmp_path / "a.txt", "text")
    assert order == ["file", "rename", "folder"]


def test_a_folder_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.writable(tmp_path / "a" / "b")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.writable(tmp_path / "file")

    def full(self: Path) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "touch", full)  # a folder of no rights stops no administrator
    with pytest.raises(OSError, match=f"No space.*{tmp_path}"):
        files.writable(tmp_path)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with files.replacing(path) as one, files.replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # its context ended last
    assert names(tmp_path) == ["a.txt"]


def kept(samples_PN: torch.Tensor) -> Evaluation:
    return Evaluation({"reward": 0.5}, samples_PN, [Prompt("a", {})] * 2)


def compare(folder: Path) -> None:
    (folder / "eval.jsonl").write_text('{"iteration": 0, "reward": 0.5}\n')
    (folder / "recipe.yaml").write_text("credit: {rule: uniform}")
    plots.compare([folder], folder / "curves.png")


PICTURES = torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)
WRITERS: dict[str, tuple[object, str, Callable[[Path], object]]] = {
    "images/000001.png": (
        Image.Image, "save", lambda f: samples.save_samples(f, 1, kept(PICTURES))
    ),
    "samples/000001.safetensors": (
        samples, "save_file", lambda f: samples.save_samples(f, 1, kept(torch.zeros(2, 1, 7)))
    ),
    "videos/000001-0.webp": (
        Image.Image, "save", lambda f: samples.save_videos(f, 1, PICTURES.transpose(0, 1))
    ),
    "curves.png": (Figure, "savefig", compare),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_half_a_picture_gets_no_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a library writes ends half-way; without that, the file is there."""
    place, function, write = WRITERS[name]
    whole = getattr(place, function)

    def half(*args: object, **options: object) -> None:
        whole(*args, **options)
        (path,) = (arg for arg in args if isinstance(arg, Path))
        os.truncate(path, path.stat().st_size // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(place, function, half)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.rglob(f"{files.ASIDE}*"))
    write(tmp_path)
    assert (tmp_path / name).stat().st_size > 0


def test_a_run_that_goes_on_removes_what_a_kill_left(tmp_path: Path) -> None:
    recipe = config.load("embedded")
    records.prepare(tmp_path, recipe, fresh=False)
    (tmp_path / "images").mkdir()
    for name in (
        "writing-00000001-metrics.jsonl",
        "images/writing-00000002-000001.png",
        "images/000000.png",
    ):
        (tmp_path / name).touch()
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    other = config.load("embedded", [("run.seed", "7")])
    with pytest.raises(records.RunError):  # the run of that folder may be under way
        records.prepare(tmp_path, other, fresh=False)
    assert len(list(tmp_path.rglob(f"{files.ASIDE}*"))) == 2
    records.prepare(tmp_path, recipe, fresh=False)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.*"))] == [
        "images/000000.png", "metrics.jsonl", "recipe.yaml",
    ]  # fmt: skip
