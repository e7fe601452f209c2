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
from torch import nn

from sfgrpo import engine
from tests.support.engines import built, step


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Stage 3 replaces it for good.
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
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
