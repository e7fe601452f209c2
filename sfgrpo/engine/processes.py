"""The ranks of a run: joining them, and gathering over them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

if not torch.cuda.is_available():  # said here, DeepSpeed does not warn that it had to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger

from sfgrpo.engine.traffic import listen, timed


def start() -> torch.device:
    """Join the processes that the `deepspeed` launcher started, or be the only one.

    Returns the device of this process.
    """
    logger.setLevel("WARNING")
    # On CPU, DeepSpeed would compile a shared-memory all-reduce at first use (half a minute, and a
    # compiler): gloo carries the few megabytes of gradients of a CPU run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized() and "RANK" not in os.environ:  # alone, so no port is opened
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    if world() > 1:
        listen()
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def gather(local: Tensor, index: Tensor) -> Tensor:
    """Rows of all ranks in the order of their global index, on every rank.

    Args:
        local: `[M, ...]`, the same M on every rank.
        index: int64 `[M]` global row numbers, a permutation of 0 .. world * M - 1 over the ranks.
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
    return torch.cat(rows)[torch.cat(places).argsort()]
