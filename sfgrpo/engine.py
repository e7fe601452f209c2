"""The only file that imports DeepSpeed: processes, the training engine, gathering over ranks.

What DeepSpeed 0.19.8 does, as found by comparing parameters with a plain PyTorch loop:
- With `gradient_accumulation_steps` = micro-batches per optimiser step and nothing else set by
  hand, `engine(...)`, `engine.backward(loss)`, `engine.step()` once per micro-batch accumulate
  the exact sum for stages 0, 1 and 2; forwards without gradient in between change nothing.
- `backward` divides the loss by the number of micro-batches and the gradients are averaged over
  ranks, so a loss that is a sum with weight w per row wants w = micro-batches / local rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from sfgrpo.config import Recipe

if not torch.cuda.is_available():  # said here, DeepSpeed does not warn that it had to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger


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
        dist.barrier()


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
    dist.all_gather(rows, local.contiguous())
    dist.all_gather(places, index.contiguous())
    return torch.cat(rows)[torch.cat(places).argsort()]


def deepspeed_config(recipe: Recipe, micro_batches: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe."""
    train, dtype = recipe.train, recipe.model.dtype
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": train.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "weight_decay": train.weight_decay,
                "torch_adam": True,
            },
        },
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": {"stage": recipe.deepspeed.zero_stage},
        "steps_per_print": 2**31 - 1,
    }


class Engine:
    """A network under training: forward, accumulate, step, save, load."""

    def __init__(self, network: nn.Module, recipe: Recipe, *, micro_batches: int) -> None:
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        self.micro_batches = micro_batches
        self._own_norm = torch.zeros(())
        self.network, *_ = deepspeed.initialize(
            model=network,
            model_parameters=self.trainable,  # pyright: ignore[reportArgumentType]
            config=deepspeed_config(recipe, micro_batches),
            dist_init_required=False,
        )

    def row_weight(self, local_rows: int) -> float:
        """Weight of one row that makes `backward` and `step` optimise the mean over all ranks."""
        return self.micro_batches / local_rows

    def backward(self, loss: Tensor) -> None:
        """Accumulate one micro-batch; the last of them takes the optimiser step."""
        self.network.backward(loss)
        if self.network.is_gradient_accumulation_boundary():
            self._own_norm = self._norm_before_step()
        self.network.step()

    def grad_norm(self) -> float:
        """Norm of the whole gradient at the last step, before clipping."""
        norm = self.network.get_global_grad_norm()
        return float(self._own_norm if norm is None else norm)

    def _norm_before_step(self) -> Tensor:
        """What DeepSpeed does not report where a plain PyTorch optimiser steps (stage 0, fp32);
        the gradients have been averaged over ranks by then."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])

    def save(self, folder: Path) -> None:
        """Write parameters and optimiser state of every rank into `folder`."""
        self.network.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.network.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
