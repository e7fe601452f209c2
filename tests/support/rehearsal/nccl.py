"""`torch.distributed` over gloo that says NCCL and takes what that takes: tensors of the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single",
    "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


def install() -> None:
    """For the rest of this process. What PyTorch sends by itself (objects, barriers) goes as gloo
    would have it."""
    begin: Any = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> None:
        options.pop("device_id", None)
        begin("gloo" if backend == "nccl" else backend, *args, **options)

    replaced: Any = dist
    replaced.init_process_group = init_process_group
    replaced.get_backend = lambda group=None: "nccl"
    replaced.is_nccl_available = lambda: True
    for name in COLLECTIVES:
        setattr(dist, name, _over_gloo(getattr(dist, name)))


def _over_gloo(collective: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(collective)

    def call(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        return collective(**{name: _on_the_host(value) for name, value in given.items()})

    return call


def _on_the_host(value: Any) -> Any:
    """The same memory; what is no tensor stays."""
    if isinstance(value, Tensor):
        if not value.is_cuda:
            raise RuntimeError(f"No backend type associated with device type {value.device.type}")
        return torch.ops.rehearsal.host(value.detach())
    return [_on_the_host(each) for each in value] if isinstance(value, list) else value
