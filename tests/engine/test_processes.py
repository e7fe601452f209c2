"""How a process finds the ranks of its run, and who else can."""

from __future__ import annotations

import importlib
import os
import socket

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch._C._distributed_c10d import TCPStore
from torch.distributed.rendezvous import rendezvous

from sfgrpo import engine, launch, train
from sfgrpo.doctor import machine
from sfgrpo.engine import LaunchError, interface, processes

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29651"}


@pytest.fixture(autouse=True)
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **LAUNCHED})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MASTER_ADDR": None}, "RANK to '0', but not MASTER_ADDR: start by deepspeed or torchrun"),
        ({"WORLD_SIZE": None, "MASTER_PORT": ""}, "not WORLD_SIZE, MASTER_PORT"),
        ({"RANK": ""}, "RANK to '', but not RANK"),
        ({"RANK": "2"}, "RANK to 2 and WORLD_SIZE to 2"),
    ],
)
def test_what_a_launcher_left_out_is_named(changes: dict[str, str | None], told: str) -> None:
    for name, value in changes.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    with pytest.raises(LaunchError, match=told):
        processes._place()


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("name", launch.NUMBERS)
def test_what_is_no_number_is_named(name: str, launched: bool) -> None:
    """Also where the process is alone: PyTorch and DeepSpeed read some of them all the same."""
    for other in () if launched else LAUNCHED:
        del os.environ[other]
    os.environ[name] = "http"
    told = f"the environment sets {name} to 'http', not a number"
    with pytest.raises(LaunchError, match=f"^{told}$"):
        engine.start()
    found = [problem for problem in machine.distributed()[1] if problem.what == told]
    assert [problem.fatal for problem in found] == [True]
    os.environ[name] = ""
    assert not launch.misread()


def test_the_command_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del os.environ["MASTER_ADDR"]
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert train.main(["embedded"]) == 2
    assert "sfgrpo.train: the environment sets RANK" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("127.0.0.5", "127.0.0.5"),
     ("worker-1", ""), ("192.0.2.7", "")],
)  # fmt: skip
def test_only_loopback_addresses_stay_on_this_machine(host: str, expected: str) -> None:
    os.environ["MASTER_ADDR"] = host
    assert interface() == expected


def test_the_store_of_one_machine_is_closed_to_the_network() -> None:
    """PyTorch's own takes any address of the machine; 127.0.0.2 stands for those."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(MASTER_PORT=str(port), WORLD_SIZE="1")  # more would be waited for
    processes._stay_on_this_machine(0)
    try:
        store, rank, world = next(iter(rendezvous("env://")))
        store.set("met", "here")
        client = TCPStore("127.0.0.1", port)
        assert (rank, world, client.get("met")) == (0, 1, b"here")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        with pytest.raises(
            LaunchError, match=f"MASTER_PORT {port} cannot be used: Address already"
        ):
            processes._stay_on_this_machine(0)
    finally:
        processes._stores.clear()


def test_a_launcher_that_brings_the_store_keeps_it() -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes._stay_on_this_machine(0)
    assert not processes._stores


@pytest.mark.parametrize("accelerator", [CPU_Accelerator, CUDA_Accelerator])
def test_no_op_of_deepspeed_is_probed(
    monkeypatch: pytest.MonkeyPatch, accelerator: type[DeepSpeedAccelerator]
) -> None:
    """As in a new process, under the name of either accelerator."""
    monkeypatch.setitem(deepspeed.ops.__dict__, "__compatible_ops__", None)  # restored at the end
    del deepspeed.ops.__dict__["__compatible_ops__"]
    monkeypatch.setattr(real_accelerator, "ds_accelerator", accelerator())
    probed: list[str] = []
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: probed.append("all") or {})
    processes._forgo_shared_memory()
    backend = importlib.import_module("deepspeed.comm.torch")  # its package has PyTorch as `torch`
    assert backend.build_shm_op() is None
    assert not probed
