"""Context parallelism: ranks that share each sequence, for samples too long for one device.

A context group is `model.context_parallel` neighbouring ranks with the same rows. In every layer a
rank has an equal part of each row's tokens, in forward and backward; self-attention exchanges
tokens for heads, so that a rank attends over the whole sequence for its share of the heads
(DeepSpeed's Ulysses, https://arxiv.org/abs/2309.14509). ZeRO shards over all ranks as ever.

It is diffusers' plans (`_cp_plan`: which inputs of which layer are split, which output is gathered)
and its attention under them that are used here:

- What a row has once (time, guidance) is left whole, so rows stand at times of their own; a time
  for every token is split with the tokens. A block that is computed again for its gradient splits
  again. Both are exact at every ZeRO stage (`tests/backbones/test_context.py`).
- DeepSpeed's `DistributedAttention` is the exchange alone: every family's attention, rotary tables
  and joint text would have to be written anew around it.
- Text that is masked is padded until it divides (`Conditioning.divisible`); each rank has a part of
  the mask, which diffusers gathers with the tokens.
- `enable_parallelism` divides by the number of accelerators, which is 0 on CPUs; what else it does
  is in `share`.
- Its hooks replace `forward` of each layer they are on, so that a deep copy of the network would
  run the weights of the original, without a word: copies are made before (`sfgrpo.policy`). Layers
  that adapters wrap have to be wrapped by then, too: what is gathered is the sum.
- The backward of its gather hands every rank the gradient of its own tokens. What a rank has of a
  parameter's gradient is thus a part, and DeepSpeed's mean over ranks too small by the size of a
  group: `Engine.row_weight` makes up for it. No plan has a parameter behind the gather.
- Its attention has no backward for other numbers of keys than queries, nor for lengths that do not
  divide; `PipelineBackbone.whole_sequences` says which families are left out, and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:  # a run without it, and a network of one's own, take nothing of this
    from diffusers.models._modeling_parallel import ContextParallelConfig

KEY = "model.context_parallel"
DEPRECATED = r"`torch\.distributed\._functional_collectives\.all_gather_tensor` is deprecated"
"""What PyTorch 2.13 says of the name by which diffusers 0.42 gathers."""


def check(backbone: Any, ranks: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """ValueError unless so many ranks can share the sequences of latents of these shapes; the
    family can (`sfgrpo.generator.check_context`)."""
    if ranks == 1:
        return
    heads = backbone.transformer.config.num_attention_heads
    shared = {"attention heads": heads}
    for shape in shapes:
        for what, length in backbone.sequences(shape).items():
            shared[f"{what} of latents {list(shape)}"] = length
    would = [n for n in range(1, heads + 1) if not any(length % n for length in shared.values())]
    for what, length in shared.items():
        if length % ranks:
            raise ValueError(
                f"{KEY}: {ranks} ranks cannot share {length} {what} evenly; heads and sequences of "
                f"this recipe divide by {', '.join(map(str, would))}"
            )


def share(network: nn.Module, ranks: int) -> None:
    """From now on let the ranks of each context group compute every row of `network` together.

    Every rank must call it, as often, and give the network the same rows as others of its group.
    """
    if ranks > 1:
        warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
        divide(network, _group(ranks))


def divide(network: nn.Module, group: ContextParallelConfig) -> None:
    """Follow the plans of the networks of diffusers in `network`, over the ranks of `group`."""
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from diffusers.models.modeling_utils import ModelMixin

    whole: list[Any] = [part for part in network.modules() if isinstance(part, ModelMixin)]
    for part in whole:
        for layer in part.modules():
            processor: Any = getattr(layer, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = ParallelConfig(context_parallel_config=group)
        apply_context_parallel(part, group, part._cp_plan)


def _group(ranks: int) -> ContextParallelConfig:
    from diffusers.models._modeling_parallel import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, names = (dist.get_world_size() // ranks, 1, ranks), ("data", "ring", "ulysses")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    config = ContextParallelConfig(ulysses_degree=ranks)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh)
    return config
