"""What each of several ranks comes to hold of a network at ZeRO stage 3. The imports are few: every
rank makes them."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from sfgrpo import engine
from sfgrpo.config import Recipe
from sfgrpo.doctor.footprint import Ledger
from sfgrpo.embeddings import backbone_of
from sfgrpo.policy import Policy
from sfgrpo.prompts import Split

SIDE, LAYERS = 128, 16


def work(recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Of each recipe: where this rank's weights were; the policy's and the frozen start's, whole.
    And the most bytes of live tensors while a network and its frozen copy are sharded."""
    results, device = {}, engine.start()
    for name, recipe in recipes.items():
        backbone, _ = backbone_of(recipe, device, Split(train=[], evaluation=[]), sharded=True)
        places = {p.device.type for p in backbone.transformer.parameters()}
        policy = Policy(backbone.transformer, recipe, backbone.lora_targets)
        with policy.reference() as start:
            whole = {"policy": _whole(policy.network), "start": _whole(start)}
        results[name] = {"places": places, **whole}
    return {**results, "held": _held(next(iter(recipes.values())))}


def _held(recipe: Recipe) -> int:
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    network = nn.Sequential(*layers).to("meta" if engine.rank() else "cpu", torch.bfloat16)
    with Ledger() as ledger:
        start = engine.frozen(network, recipe)
        engine.shard(network, recipe)
    assert start is not network
    return ledger.peak


def _whole(network: Any) -> dict[str, Tensor]:
    """State of a sharded network, or of the engine around one."""
    network = getattr(network, "module", network)
    state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().clone()
    return state
