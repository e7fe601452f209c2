"""What a backbone saves, it can be given back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.trainer import family_checks
from sfgrpo.backbones import ModuleBackbone, sd3
from sfgrpo.config import Lora
from sfgrpo.policy import add_lora
from tests.support import families


def sd3_of(folder: Path, pipeline: Path) -> Any:
    return sd3.load(pipeline, max_sequence_length=0)


def experts(folder: Path, pipeline: Path) -> Any:
    """Two networks in one."""
    if not folder.exists():
        families.save("wan22", folder)
    return family_checks.load("wan22", folder)


def own(folder: Path, pipeline: Path) -> ModuleBackbone:
    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    return ModuleBackbone(network, shape=(4,), encode=encode, lora_targets=("0", "1"))


Load = Callable[[Path, Path], Any]


@pytest.mark.parametrize("load", [sd3_of, experts, own])
@pytest.mark.parametrize("alpha", [None, 12])
def test_all_weights_come_back(
    load: Load, alpha: int | None, tmp_path: Path, pipeline_folder: Path
) -> None:
    saved, again = (load(tmp_path / "pipeline", pipeline_folder) for _ in range(2))
    for seed, backbone in enumerate((saved, again)):
        torch.manual_seed(seed)
        if alpha:
            lora = Lora(rank=4, alpha=alpha)
            add_lora(backbone.transformer, lora, backbone.lora_targets)
        for name, weight in backbone.transformer.named_parameters():
            if not alpha or ".lora_" in name:
                nn.init.normal_(weight)
    saved.save(tmp_path / "saved")
    again.restore(tmp_path / "saved")
    expected = saved.transformer.state_dict()
    for name, value in again.transformer.state_dict().items():
        if not alpha or ".lora_" in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    backbone = own(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"network.safetensors' holds no weights"):
        backbone.restore(tmp_path)
    backbone.save(tmp_path)
    state = load_file(tmp_path / "network.safetensors")
    save_file({**state, "0.bias": torch.zeros(3)}, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=r"another network: '0.bias' is there \[3\], here \[8\]"):
        backbone.restore(tmp_path)
    del state["0.bias"]
    save_file(state, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=r"'0.bias' is there missing, here \[8\] \(1 such\)"):
        backbone.restore(tmp_path)
