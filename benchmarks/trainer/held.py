"""What an engine really holds: bytes of live tensors between two micro-batches.

`deepspeed --num_gpus 2 --module benchmarks.trainer.held` prints it for two ranks.
"""

from __future__ import annotations

import gc
import json
import sys

import torch
from torch import nn

from sfgrpo import config, engine
from sfgrpo.backbones import DTYPES
from sfgrpo.doctor import footprint, memory

CASES: list[tuple[int, memory.Dtype]] = [
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (2, "fp32"),
    (2, "bf16"),
]
STAGE_3: list[tuple[int, memory.Dtype]] = [(3, "fp32"), (3, "bf16")]
"""Apart: DeepSpeed's stage 3 replaces `torch.nn.functional.linear` for the rest of the process."""


def network(dtype: torch.dtype) -> nn.Sequential:
    """Four layers, the first of them frozen."""
    layers = [nn.Linear(96, 96, bias=False) for _ in range(4)]
    layers[0].requires_grad_(False)
    return nn.Sequential(*layers).to(dtype)


def compare(stage: int, dtype: memory.Dtype) -> tuple[int, int]:
    """(measured, estimated) bytes while gradients accumulate, after the first optimiser step."""
    engine.start()
    given = config.load(
        "embedded",
        [("deepspeed.zero_stage", str(stage)), ("model.dtype", dtype), ("train.ema_decay", "0")],
    )
    ledger, torch_dtype = footprint.Ledger(), DTYPES[dtype]
    with ledger:
        trained = network(torch_dtype)
        counts = footprint.counts(trained)  # before stage 3 leaves empty parameters
        made = engine.Engine(trained, given, micro_batches=2)
        for _ in range(3):
            made.backward(made.network(torch.zeros(2, 96, dtype=torch_dtype)).float().sum())
        gc.collect()
        measured = ledger.now
    summed = made.network.get_data_types()[1]
    accumulate: memory.Dtype = "fp32" if summed == torch.float32 else dtype
    setting = memory.Setting(
        stage=stage, world=engine.world(), dtype=dtype, accumulate=accumulate,
        bucket=getattr(made.network.optimizer, "reduce_bucket_size", 0),
    )  # fmt: skip
    return measured, memory.held(counts, setting).device


def main() -> int:
    found = [(stage, dtype, *compare(stage, dtype)) for stage, dtype in (*CASES, *STAGE_3)]
    if engine.rank() == 0:
        print("HELD", json.dumps(found), flush=True)
    engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
