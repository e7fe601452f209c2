"""Activations that wait in main memory: which they are, and that nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfgrpo import config, offload
from sfgrpo.trainer import Trainer

LARGE = 2**9
"""LARGE x LARGE fp32 are a MiB."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(LARGE, LARGE, bias=False)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return self.weights(x).tanh() * shared


def gradients(where: str, blocks: nn.ModuleList, x: Tensor, shared: Tensor) -> list[Tensor]:
    with offload.activations(where):
        h: Any = x * 1.0
        for block in blocks:
            h = checkpoint(block, h, shared, use_reentrant=False)
    wanted = [x, *blocks.parameters()]
    return list(torch.autograd.grad(h.sum(), wanted))


@pytest.mark.parametrize(("rows", "waiting"), [(LARGE, 3), (LARGE - 1, 0)])
def test_inputs_of_blocks_wait_and_nothing_else(
    rows: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    waits = offload.waits

    def watched(tensor: Tensor) -> bool:
        found = waits(tensor)
        kept.extend([tensor] * found)
        return found

    monkeypatch.setattr(offload, "waits", watched)
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3))
    x = torch.randn(rows, LARGE, requires_grad=True)
    shared = torch.randn(rows, LARGE)  # every block's, and without a gradient
    stayed = gradients("none", blocks, x, shared)
    assert not kept
    waited = gradients("cpu", blocks, x, shared)
    assert all(map(torch.equal, stayed, waited))
    assert len(kept) == waiting
    assert all(tensor.shape == x.shape for tensor in kept)


def test_a_run_writes_the_same_bytes(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    written = []
    for where in ("none", "cpu"):
        keys = {"train__gradient_checkpointing": "true", "train__offload_activations": where}
        Trainer(recipe(tmp_path / where, run__iterations="1", **keys)).train()
        written.append((tmp_path / where / "metrics.jsonl").read_bytes())
    assert written[0] == written[1]


def test_without_checkpointing_it_is_refused() -> None:
    with pytest.raises(config.RecipeError, match="offload_activations: cpu needs gradient_check"):
        config.load("embedded", [("train.offload_activations", "cpu")])
