"""Does the memory of a rank fall with the ZeRO stage? Prints the table (CPU, two ranks).

    python -m benchmarks.trainer.memory [layers]    16 layers are 113 M parameters

Policy, reference, averaged weights, gradients and optimiser of the embedded model's transformer
class, scaled up, over two optimiser steps of two micro-batches. Megabytes per rank above what the
process took before the network was built: the peak while loading (every rank builds it whole here,
which of a run at stage 3 rank 0 alone does: `benchmarks.trainer.loading`), the peak in training,
and what is held after.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.support import ranks

ROWS = 2


def megabytes(name: str) -> float:
    """VmRSS (now) or VmHWM (largest so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def work(argument: tuple[int, str, int]) -> tuple[int, float, float, float]:
    """Train a little; returns the parameters of the network, and megabytes: the peak in loading,
    the peak in training, and what is held after it."""
    from sfgrpo import config, engine
    from sfgrpo.backbones.sd3 import SD3Backbone
    from sfgrpo.policy import Ema, Policy

    stage, lora, layers = argument
    torch.set_num_threads(1)
    keys = {"deepspeed.zero_stage": str(stage), "lora": lora, "train.beta": "0.1"}
    recipe = config.load("embedded", list(keys.items()))
    engine.start()
    before = megabytes("VmRSS")
    network = transformer(layers)
    size = sum(parameter.numel() for parameter in network.parameters())
    policy = Policy(network, recipe, SD3Backbone.lora_targets)
    trained = engine.Engine(policy.network, recipe, micro_batches=2)
    ema = Ema(trained.masters, 0.9)
    loading = megabytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(2 * 2):
        with policy.reference() as reference:
            target = velocity(reference)
        loss = (velocity(trained.network) - target - 1).square().mean()
        if trained.backward(loss):
            ema.update()
    return size, loading - before, megabytes("VmHWM") - before, megabytes("VmRSS") - before


def transformer(layers: int) -> torch.nn.Module:
    """A random network of the embedded model's class, 7 M parameters a layer."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers,
        attention_head_dim=64, num_attention_heads=7, joint_attention_dim=64,
        caption_projection_dim=448, pooled_projection_dim=64, pos_embed_max_size=4,
    )  # fmt: skip


def velocity(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """What it predicts for `ROWS` rows of ones."""
    rows = {
        "hidden_states": torch.ones(ROWS, 4, 8, 8, dtype=dtype),
        "timestep": torch.ones(ROWS, dtype=dtype),
        "encoder_hidden_states": torch.ones(ROWS, 4, 64, dtype=dtype),
        "pooled_projections": torch.ones(ROWS, 64, dtype=dtype),
    }
    return network(**rows, return_dict=False)[0]


def main() -> None:
    """Print the table."""
    # glibc keeps what was freed once it has seen larger blocks freed; give all of it back instead.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    print("| weights | parameters | stage | loading, MB | training, MB | held, MB |")
    print("|---" * 6 + "|")
    for weights, lora in (("full", "null"), ("lora", "{rank: 32, alpha: 64}")):
        for stage in range(4):
            argument = (stage, lora, layers)
            results = ranks.run("benchmarks.trainer.memory:work", 2, argument, timeout=900)
            size, *measured = (max(column) for column in zip(*results, strict=True))
            cells = [weights, f"{size / 1e6:.0f} M", f"{stage}", *(f"{m:.0f}" for m in measured)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    importlib.import_module("benchmarks.trainer.memory").main()
