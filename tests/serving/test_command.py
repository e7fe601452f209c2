"""`sfgrpo serve-reward` as it is used: a process in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sfgrpo import cli, rewards
from sfgrpo.remote import token
from sfgrpo.serving import command
from tests.support.served import QUICK

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "fastapi", "numpy", "pillow", "safetensors", "uvicorn")
"""What `pip install ".[serve]"` brings."""
REWARD = """
import time

import transformers  # of another version than the trainer's

def build(factor=1):
    def score(images, prompts, metadata):
        time.sleep(0.3 * (prompts[0] == "slow"))
        return images.flatten(1).mean(1) * factor * float(transformers.__version__)
    return score
"""


def requirements(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of this environment that these need, and they themselves."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system or version of Python
            continue
        wanted = [line for line in found[name].requires or [] if "extra ==" not in line]
        left += [re.split(r"[\s\[(<>=!~;]", line, maxsplit=1)[0] for line in wanted]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with `NEEDED`, and a package that the trainer has in
    another version."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements(NEEDED).values():
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "transformers.py").write_text('__version__ = "4.25"\n')
    (folder / "mine.py").write_text(REWARD)
    return folder / "bin" / "python"


@contextmanager
def running(python: Path, *arguments: str, **variables: str) -> Iterator[tuple[str, Any]]:
    """URL and process of a server."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        [str(python), "-m", "sfgrpo.cli", "serve-reward", "mine:build", "--port", "0", *arguments],
        cwd=python.parents[1], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        lines = []
        while not (found := re.search(r"http://\S+:\d+", "".join(lines[-1:]))):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_reward_in_an_environment_of_its_own(python: Path, monkeypatch: Any) -> None:
    """Without what the trainer needs, and with what would break it; SIGTERM lets it finish."""
    absent = subprocess.run([str(python), "-c", "import deepspeed"], capture_output=True)
    assert absent.returncode == 1
    secret = "only-for-this-test-0123"
    monkeypatch.setenv(token.VARIABLE, secret)
    images = torch.rand(5, 3, 4, 4)
    with running(python, "--option", "factor=2", **{token.VARIABLE: secret}) as (url, process):
        reward = rewards.build("http", url=url, batch=2, **{**QUICK, "retries": 0})
        scores = reward(images, ["a"] * 5, [{}] * 5)
        torch.testing.assert_close(scores, images.flatten(1).mean(1) * 2 * 4.25)
        last = list[torch.Tensor]()
        asking = threading.Thread(
            target=lambda: last.append(reward(images[:1], ["slow"], [{}]))
        )  # fmt: skip
        asking.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert torch.equal(last[0], scores[:1])
        said, _ = process.communicate(timeout=100)
        assert (process.returncode, secret in said) == (0, False)


def test_other_machines_need_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv(token.VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert cli.main(["serve-reward", "colour", "--port", "0", "--host", host]) == 2
        said = capsys.readouterr().err
        assert f"serve-reward: --host {host}: others can reach this address, so clients" in said
    assert all(map(command.is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("colour --port 0 --queue 0", "--queue must be at least 1, got 0"),
        ("colour --port 0 --max-body 0", "--max-body must be at least 1, got 0"),
        ("colour --port 70000", "--port must be 0 to 65535, got 70000"),
        ("colour --port 0 --option scale", "--option needs NAME=VALUE, got 'scale'"),
        ("colour --port 0 --option scal=1", "unknown option 'scal'; did you mean 'scale'"),
        ("color --port 0", "unknown reward 'color'; did you mean 'colour'"),
        ("no_such:reward --port 0", "reward 'no_such:reward' cannot be imported"),
        ("colour --port 0 --token-file /no/such", "No such file"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    given: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["serve-reward", *given.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sfgrpo serve-reward: ")
    assert message in said
    assert said.count("\n") == 1


def test_an_address_that_is_taken() -> None:
    with command.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=f"cannot listen at 127.0.0.1, port {port}: Address already"
        ):
            command.listen("127.0.0.1", port)


def test_options_are_json_where_they_are_that() -> None:
    given = ["batch=64", "device=cuda:1", "weights=[1, 2]", "path=a=b", "on=true"]
    found = {"batch": 64, "device": "cuda:1", "weights": [1, 2], "path": "a=b", "on": True}
    assert command.options(given) == found
    for twice, message in (
        (["batch=64", "batch=32"], "--option batch: it is given twice"),
        (['m={"k": 1, "k": 2}'], '--option m: the key "k" stands twice in one object'),
    ):
        with pytest.raises(ValueError, match=message):
            command.options(twice)
