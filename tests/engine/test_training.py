"""The engine on one rank, in this process."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn

from sfgrpo import config, engine


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Stage 3 replaces it for good.
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    # PyTorch computes fp16 on any CPU; DeepSpeed asks for a native one.
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    engine.start()
    yield
    engine.stop()


def test_what_deepspeed_calls_at_stage_3_does_not_warn_each_time() -> None:
    """PyTorch 2.13 has other names for the two: thousands of lines in the log of a short run."""
    whole, share = torch.zeros(4), torch.ones(4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.start()
        deepspeed.comm.all_gather_into_tensor(whole, share)
        deepspeed.comm.reduce_scatter_tensor(whole, share)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]


def built(stage: int, dtype: str, weights: str) -> engine.Engine:
    """An engine of a new network of two layers; of "part" of its weights only the second layer's
    are trained, as adapters are."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    network[0].requires_grad_(weights == "full")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    keys = {
        "deepspeed.zero_stage": str(stage), "model.dtype": dtype, "train.learning_rate": "0.1",
        "lora": "null" if weights == "full" else "{rank: 2, alpha: 2}",
    }  # fmt: skip
    recipe = config.load("embedded", list(keys.items()))
    return engine.Engine(network.to(kind), recipe, micro_batches=1)


def step(trained: engine.Engine, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take an optimiser step; returns the values it came to."""
    trained.backward(trained.network(torch.ones(2, 4, dtype=dtype)).float().square().mean())
    return trained.masters.whole()


class Calls:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("stage", "dtype", "weights"),
    [(0, "fp32", "full"), (0, "bf16", "part"), (1, "fp32", "part"), (1, "fp16", "full"),
     (2, "fp32", "full"), (2, "bf16", "part"), (3, "fp32", "part"), (3, "bf16", "full")],
)  # fmt: skip
def test_a_checkpoint_is_read_as_data(tmp_path: Path, stage: int, dtype: str, weights: str) -> None:
    first = built(stage, dtype, weights)
    computed = next(first.network.module.parameters()).dtype
    start = step(first, computed)
    first.save(tmp_path)
    expected = step(first, computed)
    second = built(stage, dtype, weights)
    second.load(tmp_path)
    found = step(second, computed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(start[name], value) for name, value in expected.items())

    files, made = sorted((tmp_path / "engine").iterdir()), tmp_path / "made"
    assert len(files) == (2 if stage or dtype != "fp32" else 1)
    for file in files:
        kept = file.read_bytes()
        held = torch.load(file, weights_only=False)
        torch.save({**held, "more": Calls(made)}, file)
        with pytest.raises(pickle.UnpicklingError, match=f"{file.name}' would call posix.mkdir, "):
            second.load(tmp_path)
        assert not made.exists()
        file.write_bytes(kept)
