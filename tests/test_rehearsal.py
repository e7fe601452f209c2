"""Whole runs on a CUDA device that is not there: what a GPU would refuse, and the CPU's numbers.

See `tests.support.rehearsal` for what is a GPU's there and what is not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trainer import family_checks
from tests.support import families

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="PyTorch has a CUDA of its own"),
]

TRAINED = ("qwenimage", "zimage", "flux2-edit", "wan22-i2v", "ltx2")
"""An image, one whose rows differ in length, an edit, a video of two networks, a video's sound."""
LOGGED = ("reward", "kl", "ratio_max", "grad_norm", "loss")


def start(*arguments: str, **given: str) -> subprocess.Popen[str]:
    # Without what this process, which has no GPU, has set for DeepSpeed.
    inherited = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **given},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told[-3000:]
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of each family that is trained."""
    place = tmp_path_factory.mktemp("rehearsal")
    for name in TRAINED:
        families.save(name, place / name)
    return place


def rehearsal(folder: Path, out: Path) -> list[str]:
    module = "tests.support.rehearsal.families"
    return ["-m", module, "--folder", str(folder), "--out", str(out)]


def on_the_cpu(name: str, folder: Path, out: Path) -> dict[str, Any]:
    return family_checks.train(name, folder / name, out / f"{name}-cpu")[1]


def the_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {key: found[key] for key in LOGGED} == pytest.approx(
        {key: expected[key] for key in LOGGED}, rel=1e-3, abs=1e-5
    )
    assert found["reward_per_state"] == pytest.approx(expected["reward_per_state"], rel=1e-4)


def test_families_train_as_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    """Rollout, estimates, rewards, loss, update, evaluation, export: no operand on two devices."""
    rehearsed = start(*rehearsal(folder, tmp_path), *TRAINED)
    expected = {name: on_the_cpu(name, folder, tmp_path) for name in TRAINED}
    output(rehearsed)
    logged = json.loads((tmp_path / "logged.json").read_text())
    for name in TRAINED:
        the_same(logged["0"][name], expected[name])


def test_two_ranks_send_nothing_of_the_host_s(folder: Path, tmp_path: Path) -> None:
    """NCCL knows no tensor of the host; stage 3 gathers and scatters what stage 0 only adds up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    command = [*rehearsal(folder, tmp_path), "qwenimage", "--zero", "0", "3"]
    ranks = [start(*command, RANK=str(rank), **joined) for rank in (0, 1)]
    expected = on_the_cpu("qwenimage", folder, tmp_path)
    for rank in ranks:
        output(rank)
    logged = json.loads((tmp_path / "logged.json").read_text())
    for stage in ("0", "3"):
        the_same(logged[stage]["qwenimage"], expected)


REFUSALS = """
import pytest
import tests.support.rehearsal
import torch
import torch.distributed as dist
from sfgrpo import engine, ops

x, host = torch.randn(2, 8, device="cuda"), torch.randn(2, 8)
ids, coef = torch.arange(2), torch.tensor([0.9, -0.1, 0.3, 0.5]).expand(2, 4)
noise = dict(seed=1, sample_ids=ids.cuda(), step_ids=3)
assert (x + 1).device == (x + torch.tensor(1.0)).device == x[ids].device == x.device
for wrong in (
    lambda: x + host,
    lambda: torch.cat([x, host]),
    lambda: torch.nn.functional.linear(x, host),
    lambda: torch.where(host > 0, x, 0.0),
    lambda: x.numpy(),
    lambda: ops.sde_step(x, host, coef.cuda(), **noise),
    lambda: ops.sde_step(x, x, coef, **noise),
):
    with pytest.raises((RuntimeError, TypeError, ValueError), match="device"):
        wrong()
moved, logp = ops.sde_step(x, x, coef.cuda(), **noise)
told, of = ops.sde_step(x.cpu(), x.cpu(), coef, **{**noise, "sample_ids": ids})
assert moved.is_cuda and torch.equal(moved.cpu(), told)
assert engine.start() == torch.device("cuda", 0) and dist.get_backend() == "nccl"
dist.all_reduce(x)
with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
    dist.all_reduce(host)
print("refused")
"""


def test_what_a_gpu_refuses_is_refused() -> None:
    """Or the runs above would show nothing."""
    assert output(start("-c", REFUSALS)).splitlines()[-1] == "refused"
