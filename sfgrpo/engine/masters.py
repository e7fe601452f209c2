"""The fp32 values that the optimiser steps, and the weights the network computes with.

Stage 0 steps the network's own parameters. The other stages step fp32 copies of which each rank
holds a share, flat and padded, and copy them to the (perhaps half-precision) weights afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from sfgrpo.engine.processes import rank

FLAT = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimisers of stages 1 and 2 keep this rank's share."""


class Masters:
    """This rank's share of the trained values."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """`optimizer` is the one DeepSpeed made for these trainable `parameters`."""
        self.optimizer = optimizer
        self.parameters = parameters
        self.sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
        flat = [getattr(optimizer, name) for name in FLAT if hasattr(optimizer, name)]
        if self.sharded:
            flat = [optimizer.fp32_partitioned_groups_flat]
        self.whole_here = not flat
        self.shares: list[Tensor] = [
            tensor.detach() for tensor in (flat[0] if flat else parameters.values())
        ]

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Replace this rank's share and have every rank compute with the new weights."""
        for share, value in zip(self.shares, values, strict=True):
            share.copy_(value)
        self.publish()

    def publish(self) -> None:
        """Copy the shares to the weights, as the optimiser does after a step."""
        if self.sharded:
            self.optimizer._partition_all_parameters()  # no layer may keep its old values
            for group in range(len(self.shares)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        elif not self.whole_here:
            self.optimizer.update_lp_params()

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """Name -> fp32 values on the CPU, on rank 0 (empty elsewhere); every rank must call it."""
        found = {}
        for name, parameter in self.parameters.items():
            value = parameter.float() if self.whole_here else safe_get_full_fp32_param(parameter)
            if rank() == 0 and value is not None:
                found[name] = value.detach().cpu().clone()
        return found

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Take this rank's share of whole values; the weights follow at the next `publish`."""
        for name, parameter in self.parameters.items():
            if self.whole_here:
                parameter.copy_(values[name])
            elif self.sharded:
                safe_set_local_fp32_param(parameter, _partition(values[name], parameter))
            else:
                safe_set_full_fp32_param(parameter, values[name].float())


def _partition(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a stage 3 parameter: equal parts of the flat values, padded."""
    size = parameter.ds_tensor.ds_numel
    flat = value.flatten().float()
    return nn.functional.pad(flat, (0, size * (rank() + 1)))[size * rank() : size * (rank() + 1)]
