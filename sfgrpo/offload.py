"""Activations that wait in main memory until the backward pass needs them.

With gradient checkpointing what a network keeps of its forward is the input of every block: of a
video of 33,000 tokens and 40 blocks of width 5,120, 13 GiB of bf16 a row. Those can wait in main
memory, at the price of copying them there and back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

SMALLEST = 2**20
"""Bytes below which a copy costs more than it saves."""


class _Waiting(saved_tensors_hooks):
    """Within the context the large tensors that the backward pass will ask for are kept on the CPU,
    in pinned memory where there is a GPU."""

    def __init__(self, host: Any) -> None:
        """`host`: hooks that keep a tensor elsewhere."""

        def pack(tensor: Tensor) -> Any:
            return host.pack_hook(tensor) if waits(tensor) else tensor

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else host.unpack_hook(kept)

        super().__init__(pack, unpack)


def waits(tensor: Tensor) -> bool:
    """Whether it is an activation of some size. What needs no gradient is not: frozen weights, and
    what all blocks are given alike, such as rotary tables, which is kept once; nor is a leaf, a
    trained weight."""
    return tensor.requires_grad and not tensor.is_leaf and tensor.nbytes >= SMALLEST


def activations(where: str, host: saved_tensors_hooks | None = None) -> AbstractContextManager[Any]:
    """The context of a forward whose activations wait on the "cpu", or stay ("none"); `host` keeps
    them there, by default PyTorch's `save_on_cpu`."""
    if where == "none":
        return nullcontext()
    return _Waiting(save_on_cpu(pin_memory=True) if host is None else host)
