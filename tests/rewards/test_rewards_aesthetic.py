"""The aesthetic predictor on a tiny CLIP with random weights, against its published layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfgrpo import rewards
from sfgrpo.rewards import aesthetic
from tests.support.clip import WIDTH, embedded, pictures, save

PROMPTS = [""] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("clip"))


def published_head() -> nn.Sequential:
    """As LAION's code has it."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(WIDTH, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_is_the_published_predictor(folder: str, tmp_path: Path, suffix: str) -> None:
    head = published_head()
    state = {f"layers.{name}": value for name, value in head.state_dict().items()}
    path = tmp_path / f"head.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    images = pictures(4)
    with torch.no_grad():
        expected = head(embedded(folder, images, PROMPTS)[0])[:, 0]
    build = aesthetic.build(model=folder, head=str(path), device="cpu", batch=3)
    scores = build(images, PROMPTS, [{}] * 4)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    assert scores.std() > 1e-5
    options = {"model": folder, "head": str(path)}
    mixture = rewards.load({"aesthetic": 1}, {"aesthetic": options})
    assert not mixture(images.requires_grad_(), PROMPTS, [{}] * 4)[0].requires_grad
    assert build(torch.empty(0, 3, 8, 8), [], []).shape == (0,)


def test_an_aesthetic_head_of_another_network_is_refused(folder: str, tmp_path: Path) -> None:
    state = published_head().state_dict()
    save_file({**state, "0.weight": torch.ones(1024, 7)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"'0.weight' should be of shape \(1024, 64\), is"):
        aesthetic.build(model=folder, head=str(tmp_path / "head.safetensors"))


def test_values_that_make_no_sense_are_named() -> None:
    with pytest.raises(ValueError, match="reward 'aesthetic': batch must be at least 1"):
        aesthetic.build(batch=0)
