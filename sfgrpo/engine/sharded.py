"""Stage 3: a network that no rank holds whole. It is shared out one parameter at a time, and made
whole for a while.

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
import torch.distributed as dist
from torch import Tensor, nn

from sfgrpo import zero
from sfgrpo.backbones.base import DTYPES
from sfgrpo.config import Recipe
from sfgrpo.engine import configuration
from sfgrpo.engine.processes import largest, rank


def shard(network: nn.Module, recipe: Recipe) -> None:
    """At stage 3, replace every parameter by this rank's share of what it is on rank 0, in the
    run's dtype; nothing at other stages. Every rank must call it.

    No device, and no host, holds more of them whole than one beside those that were there, which
    stay as they are for whoever else refers to them. Ranks other than 0 may hold the network on
    the meta device, and get the buffers that belong to its state from rank 0, too.
    """
    if not zero.shards_parameters(recipe):
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    settings, dtype = configuration.inference(recipe, network), DTYPES[recipe.model.dtype]
    shares = dict[int, Any]()  # tied weights stay tied

    def take(parameter: nn.Parameter) -> None:
        whole: Any = nn.Parameter(_sent(parameter, device, dtype), parameter.requires_grad)
        if shares:
            next(iter(shares.values())).convert_to_zero_parameters(param_list=[whole])
        else:
            alone = nn.ParameterList([whole])
            deepspeed.zero.Init(module=alone, config_dict_or_path=settings, dtype=dtype)
        shares[id(parameter)] = whole

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in shares:
                    take(parameter)
                module._parameters[name] = shares[id(parameter)]
    _share_buffers(network, device)


def _sent(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of the parameter on rank 0; elsewhere room for what DeepSpeed has rank 0 send."""
    dtype = dtype if parameter.is_floating_point() else parameter.dtype
    if rank():
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    return parameter.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _share_buffers(network: nn.Module, device: torch.device) -> None:
    """Move all buffers to the device, and give every rank those of rank 0's state."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            here = buffer.to(device)
            if name not in module._non_persistent_buffers_set:
                told: list[Any] = [(here.shape, here.dtype)]
                dist.broadcast_object_list(told, src=0)
                size, dtype = told[0]
                here = here.contiguous() if rank() == 0 else here.new_empty(size, dtype=dtype)
                dist.broadcast(here.view(-1).view(torch.uint8), src=0)
            module._buffers[name] = here


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
    """`zero.gathers_once` of a network at stage 3, by what would be free if the whole of it lay on
    the device: all ranks must find room."""
    needed = sum(configuration.shape(p).numel() * p.element_size() for p in network.parameters())
    free = None
    if torch.cuda.is_available():
        shares = ((p.device, getattr(p, "ds_tensor", p)) for p in network.parameters())
        here = sum(share.nbytes for device, share in shares if share.device == device)
        free = torch.cuda.mem_get_info()[0] - (needed - here)
    return not largest(int(not zero.gathers_once(mode, needed, free)))
