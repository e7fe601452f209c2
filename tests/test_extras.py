"""A command without what it needs says what to install, in a line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfgrpo import cli, extras

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Distributions whose module has another name."""


@pytest.mark.parametrize("extra", extras.MODULES)
def test_every_requirement_of_an_extra_is_known(extra: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{extra} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    assert listed
    names = [re.split(r"[\[><=]", item)[0] for item in re.findall(r'"([^"]+)"', listed[1])]
    assert tuple(ELSEWHERE.get(n, n) for n in names if n != "sfgrpo") == extras.MODULES[extra]


COMMANDS = {
    "recipes": "yaml", "show embedded": "pydantic", "doctor embedded": "diffusers",
    "report .": "matplotlib", "compare . --out x.png": "matplotlib", "pretrain out": "diffusers",
    "train embedded": "deepspeed",
}  # fmt: skip
"""Commands, and a module that each needs."""
SCRIPT = """
import contextlib, io, json, sys
from sfgrpo import cli, train

class Hidden:  # as if they were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
found = []
for hidden, *command in json.loads(sys.argv[1]):
    for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
        del sys.modules[name]
    main = cli.main if len(command) else train.main
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main(command or ["embedded"])
    found.append((status, told.getvalue().splitlines()))
print(json.dumps(found))
"""


def told(commands: list[list[Any]], folder: Path) -> list[tuple[int, list[str]]]:
    """Exit status and lines on stderr of commands, each `[hidden modules, argument, ...]`, in a
    process of its own, which may lose modules; without arguments, of `python -m sfgrpo.train`."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        # PyTorch warns by itself that there is no numpy.
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        timeout=200, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_with_the_ops_alone_every_command_says_what_to_install(tmp_path: Path) -> None:
    everything = [module for modules in extras.MODULES.values() for module in modules]
    commands = [[everything, *command.split()] for command in COMMANDS]
    for status, lines in told([*commands, [everything]], tmp_path):
        assert (status, len(lines)) == (2, 1), lines
        assert lines[0].startswith("sfgrpo: No module named '")
        assert lines[0].endswith('; pip install ".[train]", or ".[demo]" for the embedded model')


@pytest.mark.slow
def test_whichever_module_is_missing(tmp_path: Path) -> None:
    commands = [[[module], *command.split()] for command, module in COMMANDS.items()]
    found = told(commands, tmp_path)
    for module, (status, lines) in zip(COMMANDS.values(), found, strict=True):
        assert (status, len(lines)) == (2, 1), lines
        assert f"No module named '{module}" in lines[0]
        assert 'pip install ".[train]"' in lines[0]


def test_what_is_missing_decides_what_is_advised() -> None:
    def missing(name: str) -> ModuleNotFoundError:
        return ModuleNotFoundError(f"No module named '{name}'", name=name)

    assert extras.needed(missing("onnxruntime.capi")) == 'pip install ".[demo]"'
    assert extras.needed(missing("fastapi")) == 'pip install ".[serve]"'
    assert extras.needed(missing("httpx2")) == 'pip install ".[http]"'
    for other in (missing("my_robot"), missing("torchvision"), ImportError("yaml"), None):
        assert extras.needed(other) is None
    outer = ValueError("backbone 'sd3' cannot be imported: No module named 'diffusers'")
    outer.__cause__ = missing("diffusers")
    assert extras.explained(outer).startswith(f'{outer}; pip install ".[train]"')
    assert extras.explained(ValueError("a wrong key")) == "a wrong key"


def test_a_module_of_ones_own_is_not_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    def imports(*_: object) -> int:
        raise ModuleNotFoundError("No module named 'my_robot'", name="my_robot")

    monkeypatch.setitem(cli.COMMANDS, "recipes", imports)
    with pytest.raises(ModuleNotFoundError, match="my_robot"):
        cli.main(["recipes"])


def test_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "recipes", interrupted)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err == "\nsfgrpo: interrupted\n"
