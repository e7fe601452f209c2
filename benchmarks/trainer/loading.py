"""What do ranks hold while a run starts at ZeRO stage 3? Prints the table (CPU, two ranks).

    python -m benchmarks.trainer.loading [layers]    12 layers are 0.4 G parameters

The embedded model's pipeline with its transformer scaled up, in files of half and of full
precision, and a trainer of it in bf16, until it could begin. Megabytes of anonymous memory (that of
no other process, and that no file stands for) above those before, of each rank: the most until the
weights, and their frozen copy where there is one, are sharded; the most until the trainer stands,
with the optimiser's fp32 weights, and what is left then. The digest is of all weights' bits,
gathered, beside that of the files.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import ranks

WEIGHTS = {"lora": "{rank: 8, alpha: 8}", "full": "null"}
"""Full weights with a KL, so that a frozen copy of the start is kept."""


def anonymous() -> float:
    """Megabytes of this process that no file stands for."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


@contextmanager
def most(found: list[float]) -> Iterator[None]:
    """Keep the most of `anonymous` within the context as the only entry of `found`."""
    over, found[:] = threading.Event(), [anonymous()]

    def look() -> None:
        while not over.wait(0.01):
            found[0] = max(found[0], anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def digest(values: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and bits, in the order of the names."""
    found = hashlib.sha256()
    for name, value in sorted(values, key=lambda pair: pair[0]):
        found.update(name.encode())
        found.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()[:12]


def pipeline(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """Write the embedded pipeline with a random transformer; returns its parameters."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from sfgrpo.embedded import architecture

    made = architecture.build_pipeline(0)
    config = {**made.transformer.config, "num_layers": layers, "num_attention_heads": 16}
    config |= {"attention_head_dim": 64, "caption_projection_dim": 1024}
    network: Any = SD3Transformer2DModel.from_config(config)
    made.register_modules(transformer=network.to(dtype))
    made.save_pretrained(folder)
    return sum(parameter.numel() for parameter in network.parameters())


def work(argument: tuple[Path, str]) -> tuple[float, float, float, str]:
    """Start a run; returns megabytes, as in the table, and the digest of the weights."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    from sfgrpo import config, engine, trainer

    folder, weights = argument
    torch.set_num_threads(1)
    keys = {
        "model.path": str(folder), "model.dtype": "bf16",
        "lora": WEIGHTS[weights], "train.ema_decay": "0", "train.beta": "0.1",
        "deepspeed.zero_stage": "3", "run.output_dir": str(folder / "run"),
        "reward": "{colour: 1}", "eval.judges": "[]",
    }  # fmt: skip
    recipe = config.load("embedded", list(keys.items()))
    engine.start()
    before, found, sharded = anonymous(), list[float](), list[float]()
    shards = DeepSpeedZeRoOffload.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        shards(self, *arguments, **options)
        sharded.append(max(found[0], anonymous()))  # of the frozen copy, then of what is trained

    with patch.object(DeepSpeedZeRoOffload, "__init__", noted), most(found):
        made = trainer.Trainer(recipe, fresh=True)
    held = anonymous()
    told = digest(_gathered(made.engine.network.module))
    return sharded[-1] - before, found[0] - before, held - before, told


def _gathered(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The network's own parameters, whole."""
    import deepspeed

    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if "lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter.detach().clone()


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted((folder / "transformer").glob("*.safetensors"))
    for name, value in (item for file in files for item in load_file(file).items()):
        if name != "pos_embed.pos_embed":  # a buffer
            yield name, value.to(torch.bfloat16)


def main() -> None:
    """Print the table."""
    # glibc keeps what was freed once it has seen larger blocks freed; give all of it back instead.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = pipeline(folder, layers, dtype)
            print(
                f"\n{count / 1e6:.0f} M parameters in files of {dtype}, {count * 2 / 2**20:.0f} MB "
            )
            print(f"in the run; their digest {digest(_stored(folder))}\n")
            print("| weights | until sharded, MB | both | until it stands | left | digest |")
            print("|---|---:|---:|---:|---:|---|")
            for weights in WEIGHTS:
                found = ranks.run("benchmarks.trainer.loading:work", 2, (folder, weights))
                *columns, digests = zip(*found, strict=True)
                each = [", ".join(f"{m:.0f}" for m in column) for column in columns]
                each.insert(1, f"{sum(columns[0]):.0f}")
                cells = [weights, *each, ", ".join(dict.fromkeys(digests))]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    importlib.import_module("benchmarks.trainer.loading").main()
