"""The ranks of a run: joining them, and gathering over them."""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, TCPStore

if not torch.cuda.is_available():  # said here, DeepSpeed does not warn that it had to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import groups, logger

from sfgrpo import launch
from sfgrpo.engine.traffic import listen, timed

T = TypeVar("T")
_stores: list[TCPStore] = []
"""What ranks of one machine meet at; it lives as long as the process."""
DEPRECATED = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
"""What PyTorch 2.13 says at every layer and step of stage 3: DeepSpeed 0.19.8 gathers and reduces
by names that are deprecated, and does so in its own code, where no call of ours can spare it."""


class LaunchError(RuntimeError):
    """What a launcher left in the environment cannot be joined; the message names the variable."""


def start() -> torch.device:
    """Join the processes that the `deepspeed` launcher started, or be the only one.

    Returns the device of this process.

    Raises:
        LaunchError: the environment names a rank, and not all that is needed to find the others, or
            holds what is no number in a place of one.
    """
    logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
    _forgo_shared_memory()
    for wrong in launch.misread():  # also of a process that runs alone: libraries read them
        raise LaunchError(wrong)
    local = int(os.environ.get("LOCAL_RANK") or "0")
    os.environ["LOCAL_RANK"] = str(local)  # DeepSpeed insists on it
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        number, count = _place()
        if count == 1:  # so no port is opened
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        elif interface():
            _stay_on_this_machine(number)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    if world() > 1:
        listen()
    return device


def _forgo_shared_memory() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce on CPU at first use (half a minute,
    and a compiler): gloo carries the few megabytes of gradients of a CPU run.

    Reading `deepspeed.ops.__compatible_ops__` for the first time probes every op of the accelerator
    (compilers, on GPUs the toolkit, too) and prints what it cannot build. So the name is looked up
    and, where no one has read it, set, without being read.
    """
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _place() -> tuple[int, int]:
    """This process's rank and the number of processes, as the launcher says."""
    if "RANK" not in os.environ:
        return 0, 1
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if lacking := [name for name in needed if not os.environ.get(name)]:
        raise LaunchError(
            f"the environment sets RANK to '{os.environ['RANK']}', but not {', '.join(lacking)}: "
            "start by deepspeed or torchrun, which set all of them, or unset RANK to run alone"
        )
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if number >= count:
        raise LaunchError(f"the environment sets RANK to {number} and WORLD_SIZE to {count}")
    return number, count


def interface() -> str:
    """Where rank 0 listens for the others: on loopback, or everywhere ("") if MASTER_ADDR says that
    ranks come over a network.

    A host's own name may stand for a loopback address in its own table of hosts, and for another
    in everybody else's: only what cannot be meant for others counts as loopback.
    """
    host = os.environ.get("MASTER_ADDR", "")
    return "127.0.0.1" if host == "localhost" else host if host.startswith("127.") else ""


def _stay_on_this_machine(number: int) -> None:
    """Keep the network out of a run whose ranks are all here.

    PyTorch's store listens on every interface, whatever MASTER_ADDR says, but takes a store that
    its process already has at the same port: rank 0 opens one on loopback. Under torchrun the store
    is the launcher's own process's, which leaves no choice.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if number or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return
    port = int(os.environ["MASTER_PORT"])
    try:
        listener = socket.create_server((interface(), port)).detach()
    except OSError as error:
        raise LaunchError(
            f"MASTER_PORT {port} cannot be used: {error.strerror}; choose another, by "
            "--master_port of deepspeed"
        ) from error
    store = TCPStore(
        interface(), port, is_master=True, multi_tenant=True, master_listen_fd=listener,
        wait_for_workers=False,
    )  # fmt: skip
    _stores.append(store)


def stop() -> None:
    """Leave the process group; a later `start` of this process makes a new one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # DeepSpeed remembers the group, and would hand out one that PyTorch no longer knows.
        deepspeed.comm.comm.cdb = groups._WORLD_GROUP = None  # pyright: ignore[reportAttributeAccessIssue]


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def context_group(ranks: int) -> tuple[int, int]:
    """(which group of so many neighbouring ranks this one belongs to, how many groups there are):
    the ranks of a group work on the same rows (`sfgrpo.backbones._context`)."""
    return rank() // ranks, world() // ranks


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        with timed("waiting"):
            dist.barrier()


def largest(value: int) -> int:
    """The largest of all ranks' values."""
    if world() == 1:
        return value
    found = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    with timed("waiting"):
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def exchange(value: T) -> list[T]:
    """Every rank's value (anything that can be pickled), in the order of the ranks, on each."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with timed("waiting"):
        dist.all_gather_object(found, value)
    return cast("list[T]", found)


def gather(local: Tensor, index: Tensor) -> Tensor:
    """Rows of all ranks in the order of their global index, on every rank; of a row that several
    ranks hold, the first's.

    Args:
        local: `[M, ...]`, the same M on every rank.
        index: int64 `[M]` global row numbers: over the ranks all of 0 .. N - 1, each as often.
            int64: a float32 cannot tell ids above 2^24 apart.
    """
    if world() == 1:
        return local[index.argsort()]
    rows = [torch.empty_like(local) for _ in range(world())]
    places = [torch.empty_like(index) for _ in range(world())]
    barrier()
    with timed("communication"):
        dist.all_gather(rows, local.contiguous())
        dist.all_gather(places, index.contiguous())
    where = torch.cat(places)
    copies = len(where) // (int(where.max()) + 1)
    return torch.cat(rows)[where.argsort(stable=True)[::copies]]
