"""What one rank of a context group computes, without the others (`sfgrpo.backbones._context`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelConfig
from torch import Tensor, nn

from sfgrpo import generator
from sfgrpo.backbones import _context
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.config import Recipe


def groups(recipe: Recipe, backbone: PipelineBackbone, world: int) -> int:
    """How many groups of ranks have rows of their own.

    Raises:
        ValueError: ranks cannot share the recipe's sequences as it asks.
    """
    generator.check_context(recipe, world)
    shapes = generator.shapes(recipe, backbone)
    _context.check(backbone, recipe.model.context_parallel, shapes)
    return world // recipe.model.context_parallel


class _Gather(torch.autograd.Function):
    """What gathering the parts of all ranks allocates: they arrive one behind the other."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, ranks: int) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        arrived = part.new_empty(ranks * len(part), *part.shape[1:])
        return torch.cat(arrived.chunk(ranks), dim)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[0].chunk(ctx.ranks, ctx.dim)[0], None, None


@contextmanager
def alone(network: nn.Module, ranks: int) -> Iterator[None]:
    """Within the context `network` computes one rank's part on tensors without values: what others
    would send is allocated, and never comes."""
    if ranks == 1:
        yield
        return
    group = ContextParallelConfig(ulysses_degree=ranks)
    group._flattened_mesh = group._ulysses_mesh = mock.Mock()
    _context.divide(network, group)
    split = mock.patch.object(
        EquipartitionSharder, "shard", lambda whole, dim, _: whole.chunk(ranks, dim)[0]
    )
    gather = mock.patch.object(
        EquipartitionSharder, "unshard", lambda part, dim, _: _Gather.apply(part, dim, ranks)
    )
    exchange = mock.patch.object(
        attention_dispatch, "_all_to_all_single", lambda sent, _: torch.empty_like(sent)
    )
    with split, gather, exchange:
        yield
