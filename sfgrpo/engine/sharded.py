"""Stage 3: a network no rank holds whole, made whole for a while.

DeepSpeed gathers a layer when its forward begins and lets it go when it ends. Sampling an image
runs the network tens of times, so that each layer is gathered as often. Where the network fits into
memory, one gather serves a whole rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor, nn

from sfgrpo import zero
from sfgrpo.engine.processes import largest, rank


class _Idle:
    """Stands in for DeepSpeed's coordinator while everything is gathered: the layers' hooks find
    nothing to fetch or to release, ranks do not wait for each other in a forward, and the order
    of layers recorded for training stays."""

    def reset_step(self) -> None: ...

    def trace_prologue(self, module: nn.Module) -> None: ...

    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, module: nn.Module, forward: bool) -> None: ...

    def release_sub_module(self, module: nn.Module, forward: bool = False) -> None: ...


@contextmanager
def gathered(network: Any) -> Iterator[None]:
    """Within the context every rank holds all parameters of a stage 3 engine; read, not written.

    `network` is the DeepSpeed engine of the trained network.
    """
    offload = network.optimizer.parameter_offload
    offload.partition_all_parameters()
    with deepspeed.zero.GatheredParameters(list(network.module.parameters())):
        coordinator, offload.param_coordinator = offload.param_coordinator, _Idle()
        try:
            yield
        finally:
            offload.param_coordinator = coordinator


@contextmanager
def whole_state(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the context `network.state_dict()` holds `parameters` whole, on rank 0.

    They are gathered one by one and kept on the CPU of rank 0, so that no device needs room for
    all of them. Every rank must enter.
    """
    whole: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank() == 0:
                whole[name] = parameter.detach().cpu().clone()

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in whole.keys() & {key.removeprefix(prefix) for key in state}:
            state[prefix + name] = whole[name]

    hook = network.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def gathers_once(mode: Literal["auto", "rollout", "layer"], network: nn.Module) -> bool:
    """`zero.gathers_once` of a network that is about to be sharded: all ranks must find room."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    needed = sum(p.numel() * p.element_size() for p in network.parameters())
    return not largest(int(not zero.gathers_once(mode, needed, free)))
