"""How the repository is laid out: packages, tests beside what they test, imports that run down."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python has none

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, Path] = {n: ROOT / f for n, f in SETUPTOOLS["package-dir"].items()}

FLOORS = (
    ("option_types",),
    ("", "names", "files", "cores", "csrc"),  # "" is sfgrpo/__init__.py
    ("extras", "samplers", "launch", "recipe_yaml", "json_text", "arguments", "hashes", "track"),
    ("run.records", "run.lock", "run.alarms"),
    ("report", "recipe_text"),  # of a run that is over: reading it needs nothing that trains
    ("sections", "prompts"),
    ("config",),
    ("compare",),  # its runs are processes of their own: it needs nothing that trains
    ("ops", "zero"),
    ("kernels",),  # found by name when a GPU calls: ops knows no backend
    ("sde", "recording", "tally", "stream", "offload", "processors"),
    ("credit", "drift", "loss", "scheduler", "solvers"),
    ("backbones",),
    ("remote",),
    ("rollout", "generator", "rewards"),
    ("serving",),
    ("layout", "engine", "estimates"),
    ("cost", "policy", "statistics"),
    ("score", "embeddings", "guard"),
    ("evaluate", "update"),
    ("run",),
    ("standing",),
    ("saved",),
    ("trainer", "doctor", "probe"),
    ("train", "embedded"),
    ("recipes", "cli"),
)
"""The modules and packages of sfgrpo from the bottom up. A floor imports those below it, never
another of its own floor or one above; within a package anything goes, except that a module of it
that is named here has its own floor."""
HEIGHT = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MIRRORED = {
    "import_kernels": "kernels",
    "imports": "sfgrpo/__init__.py",
    "own_network": "sfgrpo/backbones/_module.py",
    "readme": "README.md",
    "rehearsal": "sfgrpo/trainer.py",
    "scheduler_changes": "sfgrpo/scheduler.py",
    "scheduler_pipelines": "sfgrpo/scheduler.py",
    "structure": "pyproject.toml",
}
"""What a test on top is about where no module is called like it: tests/test_NAME.py -> path."""


def packages() -> Iterator[tuple[str, Path]]:
    """(dotted name, folder) of everything that holds Python files."""
    for name, base in FOLDERS.items():
        for folder in sorted({path.parent for path in base.rglob("*.py")}):
            yield ".".join((name, *folder.relative_to(base).parts)), folder


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module; a package is its `__init__`."""
    for name, folder in packages():
        for path in sorted(folder.glob("*.py")):
            yield name if path.stem == "__init__" else f"{name}.{path.stem}", path


def entry(module: str) -> str:
    """What of `FLOORS` a module, or a name in it, belongs to: the longest that it begins with, ""
    (the package itself) if there is none."""
    parts = module.split(".")[1:]
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in HEIGHT), "")


class Imports(ast.NodeVisitor):
    """Collects (line, dotted name), inside functions, too; those for types alone are left out."""

    def __init__(self, source: str) -> None:
        self.found: list[tuple[int, str]] = []
        self.visit(ast.parse(source))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = "." * node.level + (node.module or "")
        self.found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]


def upwards(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, entry) of the imports in `source` that do not run down from `module`."""
    here = entry(module)
    for line, target in Imports(source).found:
        assert not target.startswith("."), f"{module}, line {line}: {target} is relative"
        there, is_ours = entry(target), target.split(".")[0] == "sfgrpo"
        if is_ours and there != here and HEIGHT[there] >= HEIGHT[here]:
            yield line, there


def test_imports_run_down() -> None:
    found = []
    for module, path in modules():
        name = path.relative_to(ROOT).as_posix()
        found += [
            f"{name}:{line} imports sfgrpo.{t}" for line, t in upwards(module, path.read_text())
        ]
    assert not found, "imports that run upwards:\n" + "\n".join(found)


def test_floors_name_what_there_is() -> None:
    """Once each; every module stands on one."""
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(HEIGHT)
    there = [name for name, _ in (*packages(), *modules())]
    assert {f"sfgrpo.{name}".rstrip(".") for name in names} - set(there) == set()
    lost = {name for name in there if name != "sfgrpo" and entry(name) == ""}
    assert not lost, f"stand on no floor: give each one in {Path(__file__).name}"


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("sfgrpo.ops.tweedie", "from sfgrpo import names, trainer", [(1, "trainer")]),
        ("sfgrpo.ops", "def f():\n    import sfgrpo.sde", [(2, "sde")]),
        ("sfgrpo.sde", "from sfgrpo.credit import Credit", [(1, "credit")]),
        ("sfgrpo.run.records", "from sfgrpo.run import clock", [(1, "run")]),
        ("sfgrpo.run.clock", "from sfgrpo.run import records, peers", []),
        ("sfgrpo.cli", "from sfgrpo import __version__\nimport torch", []),
        ("sfgrpo.ops", "if typing.TYPE_CHECKING:\n    import sfgrpo.train\nelse:\n    pass", []),
        ("sfgrpo.ops", "if not TYPE_CHECKING:\n    import sfgrpo.train", [(2, "train")]),
    ],
)
def test_what_counts_as_upwards(module: str, source: str, expected: list[tuple[int, str]]) -> None:
    assert list(upwards(module, source)) == expected


def test_packages_are_the_folders() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(name for name, _ in packages())


def test_packages_carry_their_data() -> None:
    """Every file that is not Python belongs to a pattern, and every pattern has files."""
    carried: set[Path] = set()
    folders = dict(packages())
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            files = {path for path in folders[package].glob(pattern) if path.is_file()}
            assert files, f"{package}: no file is called {pattern}"
            carried |= files
    built = {".py", ".pyc", ".so"}
    for base in FOLDERS.values():
        files = {path for path in base.rglob("*") if path.is_file() and path.suffix not in built}
        lost = sorted(str(path.relative_to(ROOT)) for path in files - carried)
        assert not lost, "no pattern of package-data carries them into a wheel"


def test_every_test_stands_beside_what_it_tests() -> None:
    """tests/ROOM/test_*.py is about the package sfgrpo.ROOM, tests/test_NAME.py about a module."""
    there = {module for module, _ in modules()}
    files = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    on_top = {path.stem.removeprefix("test_") for path in files if len(path.parts) == 1}
    rooms = {".".join(path.parts[:-1]) for path in files if len(path.parts) > 1}
    outside = {name for name in rooms if (ROOT / name).is_dir()}  # benchmarks
    assert {f"sfgrpo.{n}" for n in rooms - outside | on_top - MIRRORED.keys()} - there == set()
    assert MIRRORED.keys() - on_top == set()
    assert [path for path in MIRRORED.values() if not (ROOT / path).exists()] == []
