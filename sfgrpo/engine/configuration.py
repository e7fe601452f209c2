"""A recipe as DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfgrpo import zero
from sfgrpo.config import Recipe


def shape(parameter: nn.Parameter) -> torch.Size:
    """Its shape when it is whole, which at stage 3 it is for a while only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def training(recipe: Recipe, network: nn.Module, micro_batches: int) -> dict[str, Any]:
    """The configuration of the engine that trains `network`."""
    train, offload = recipe.train, recipe.deepspeed.offload_optimizer == "cpu"
    return {
        **inference(recipe, network),
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": train.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "weight_decay": train.weight_decay,
                # DeepSpeed's own Adam for the CPU pays beside a GPU; it compiles for a minute.
                "torch_adam": not (offload and torch.cuda.is_available()),
            },
        },
    }


def inference(recipe: Recipe, network: nn.Module) -> dict[str, Any]:
    """What holds for every network of the run, trained or frozen."""
    dtype, scale = recipe.model.dtype, recipe.train.loss_scale
    return {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "loss_scale": 0 if scale == "dynamic" else scale},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(recipe, network),
        "steps_per_print": 2**31 - 1,
    }


def _zero(recipe: Recipe, network: nn.Module) -> dict[str, Any]:
    """What is sharded and where it lies."""
    shapes = [(shape(p), p.requires_grad) for p in network.parameters()]
    trainable = [shape.numel() for shape, trained in shapes if trained]
    options: dict[str, Any] = {
        "stage": zero.stage(recipe),
        "reduce_bucket_size": zero.bucket(sum(trainable), max(trainable, default=0)),
        "allgather_bucket_size": zero.BUCKET,
        "offload_optimizer": {"device": recipe.deepspeed.offload_optimizer},
    }
    if zero.shards_parameters(recipe):
        # Vectors (biases, norms) stay whole on every rank, matrices are sharded.
        vectors = [shape.numel() for shape, _ in shapes if len(shape) < 2]
        options["stage3_param_persistence_threshold"] = max(vectors, default=0)
        elements = sum(shape.numel() for shape, _ in shapes)
        options["stage3_max_live_parameters"] = zero.live(elements)
        options["stage3_max_reuse_distance"] = zero.live(elements)
        options["stage3_prefetch_bucket_size"] = min(zero.PREFETCH, elements // 16)
        options["offload_param"] = {"device": recipe.deepspeed.offload_parameters}
    return options
