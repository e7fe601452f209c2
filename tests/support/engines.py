"""Engines of a tiny network, and what they hold."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn

from sfgrpo import config, engine
from sfgrpo.engine import configuration

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def built(stage: int, dtype: str, weights: str, **zero: Any) -> engine.Engine:
    """An engine of a new network of two layers, whose odd numbers of elements are padded; of "part"
    of its weights only the second layer's are trained, as adapters are. `zero` adds to DeepSpeed's
    options of ZeRO."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
    network[0].requires_grad_(weights == "full")
    network.register_buffer("table", torch.zeros(3))
    keys = {
        "deepspeed.zero_stage": str(stage), "model.dtype": dtype, "train.learning_rate": "0.1",
        "lora": "null" if weights == "full" else "{rank: 2, alpha: 2}",
    }  # fmt: skip
    recipe, options = config.load("embedded", list(keys.items())), configuration._zero
    with (
        patch.object(configuration, "_zero", lambda *given: options(*given) | zero),
        # PyTorch computes fp16 on any CPU; DeepSpeed asks for a native one.
        patch.object(CPU_Accelerator, "is_fp16_supported", lambda self: True),
        # It collects garbage to say how much memory is used: four times, a quarter second each.
        patch.object(bf16_optimizer, "see_memory_usage", lambda *message, force: None),
    ):
        return engine.Engine(network.to(KINDS[dtype]), recipe, micro_batches=1)


def step(trained: engine.Engine, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take an optimiser step; returns the values it came to."""
    trained.backward(trained.network(torch.ones(2, 5, dtype=dtype)).float().square().mean())
    return trained.masters.whole()


def held(trained: engine.Engine) -> dict[str, Any]:
    """All that a checkpoint has to keep, whole, on rank 0; every rank must call it."""
    optimizer, found = trained.network.optimizer, dict[str, Any](trained.masters.whole())
    if trained.stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()  # what its own step does first
    for name, parameter in trained.trainable.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, kind)
            assert value is not None
            found[f"{name} {kind}"] = value.clone()
    with trained.exporting():
        state = trained.network.module.state_dict()
        found |= {f"{n} computed": state[n].clone() for n in ("table", *trained.trainable)}
    found["steps"] = {float(kept["step"]) for kept in optimizer.optimizer.state.values()}
    scaler = getattr(optimizer, "loss_scaler", None)  # one optimiser for bf16 has none
    found["scaler"] = dict(vars(scaler)) if scaler and scaler.dynamic else {}
    return found
