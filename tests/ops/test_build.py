"""The just-in-time build of the C++ library: where it fails, plain PyTorch serves; nothing dies."""

from __future__ import annotations

import importlib.util
import pwd
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sfgrpo.csrc import build
from sfgrpo.ops import _backends

LIBRARY = b"a library"


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Compilations so far; they write LIBRARY, into a cache of the test's own."""
    runs: list[Path] = []

    def compiles(compiler: list[str], torch_folder: Path, scratch: Path) -> Path:
        built = scratch / "libsfgrpo.so"
        built.write_bytes(LIBRARY)
        runs.append(built)
        return built

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_compiler", lambda: ["c++"])
    monkeypatch.setattr(build, "_compile", compiles)
    return runs


def _cut(library: Path) -> None:
    library.write_bytes(LIBRARY[:4])


def _emptied(library: Path) -> None:
    library.write_bytes(b"")


def _without_digest(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [_cut, _emptied, _without_digest, Path.unlink])
def test_a_damaged_library_is_compiled_anew_once(
    compiled: list[Path], damage: Callable[[Path], None]
) -> None:
    library = build.just_in_time()
    assert build.just_in_time() == library
    assert len(compiled) == 1
    damage(library)
    assert build.just_in_time() == library
    assert build.just_in_time() == library
    assert len(compiled) == 2
    assert library.read_bytes() == LIBRARY
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".sha256", ".so"]


def test_of_those_that_come_at_once_one_compiles(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks of a node do: a lock is of an open file, so threads stand for processes."""
    at_work, compiles = threading.Event(), build._compile

    def slowly(*arguments: Any) -> Path:
        at_work.set()
        time.sleep(0.3)  # enough for the others to come to the lock
        return compiles(*arguments)

    monkeypatch.setattr(build, "_compile", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(build.just_in_time)
        assert at_work.wait(10)
        others = [pool.submit(build.just_in_time) for _ in range(2)]
        assert {one.result() for one in (first, *others)} == {first.result()}
    assert len(compiled) == 1


def test_the_library_is_on_the_disk_before_it_has_its_name(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace = build.os.replace

    def replaced(source: Path, target: Path) -> None:
        events.append(f"named {target.name}")
        replace(source, target)

    monkeypatch.setattr(build, "_sync", lambda file: events.append(f"synced {file.name}"))
    monkeypatch.setattr(build.os, "replace", replaced)
    build.just_in_time()
    names = ("libsfgrpo.sha256", "libsfgrpo.so")
    assert events == [f"{what} {name}" for name in names for what in ("synced", "named")]


def _unloadable(path: str) -> None:
    raise OSError(f"{path}: failed to map segment from shared object")


def _falls_back(match: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch serves the ops.*{match}") as caught:
        _backends.load_cpp()
    assert len(caught) == 1


def test_a_library_that_cannot_be_loaded_is_a_warning(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "load_library", _unloadable)
    for _ in range(2):
        _falls_back("failed to map segment")
    assert len(compiled) == 1  # another one would fare no better


def test_a_cache_that_cannot_be_written_is_a_warning(
    compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    _falls_back("Not a directory")


def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home(
    compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_home(monkeypatch)
    assert build.just_in_time().is_relative_to(tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    _falls_back("home directory")


@pytest.mark.parametrize("empty", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_an_empty_setting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(empty, "")
    assert build._cache().parent == tmp_path / ".cache" / "torch_extensions"


@pytest.mark.parametrize(
    ("value", "words"),
    [("", ["c++"]), ("sh", ["sh"]), ("sh -m64 -x", ["sh", "-m64", "-x"]), ("no-such c++", None)],
)
def test_the_compiler_may_have_arguments(
    value: str, words: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in ("c++", "sh") else None)
    monkeypatch.setenv("CXX", value)
    assert build._compiler() == words


def test_setuptools_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setuptools", None)
    monkeypatch.setitem(sys.modules, "setuptools.command.build_ext", None)
    spec = importlib.util.spec_from_file_location("build_without_setuptools", build.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.just_in_time
