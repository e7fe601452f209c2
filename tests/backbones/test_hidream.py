"""HiDream's experts and its sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from safetensors.torch import load_file
from torch import Tensor, nn

from sfgrpo import backbones
from sfgrpo.backbones.hidream import Routed
from tests.support.families import several


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits are compared, and those of a product depend on how threads share its rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made() -> Any:
    return backbones.load("hidream", "none", pipeline=several.hidream())


def given(made: Any, h: int, w: int) -> tuple[Tensor, Tensor, Any]:
    """Latents, times and conditioning of two rows."""
    cond = made.blank(2)
    torch.manual_seed(0)
    for tensor in cond.tensors().values():
        tensor.normal_()
    return torch.randn(2, 4, h, w), torch.tensor([0.9, 0.3]), cond


def test_experts_have_the_stock_layers_values_and_gradient() -> None:
    """Its values in sampling; the gradient that it has in training, which sampling's has not."""
    torch.manual_seed(0)
    stock = MOEFeedForwardSwiGLU(16, 24, num_routed_experts=4, num_activated_experts=2)
    x = torch.randn(3, 5, 16, requires_grad=True)

    def gradients(layer: nn.Module, tokens: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(layer(tokens).square().sum(), [x, *layer.parameters()]))

    expected = gradients(stock.train(), x)
    assert torch.equal(Routed(stock)(x), stock.eval()(x))
    ours = Routed(stock)
    for mode in (True, False):
        for found, grad in zip(gradients(ours.train(mode), x), expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4)
    # Of one token, two experts have none: ranks still agree on what they average.
    grads = gradients(ours, x[:1, :1])
    assert [grad.any().item() for grad in grads[1:]].count(False) == 2 * 3


def test_training_mode_changes_no_velocity(made: Any) -> None:
    """The stock network leaves latents in tokens there."""
    x, t, cond = given(made, 4, 4)
    expected = made.velocity(made.transformer, x, t, cond)
    found = made.velocity(made.transformer.train(), x, t, cond)
    made.transformer.eval()
    assert torch.equal(found, expected)


def test_images_that_are_not_square_are_those_of_the_stock_network(made: Any) -> None:
    """It pads their tokens to its largest number."""
    stock = several.hidream().transformer
    for h, w in ((4, 8), (2, 6), (6, 6)):  # square ones may be larger
        x, t, cond = given(made, h, w)
        with torch.no_grad():
            (expected,) = stock(
                x, 1000 * t, cond.tokens, cond.extra["llama"].transpose(0, 1), cond.pooled,
                return_dict=False,
            )  # fmt: skip
            assert torch.equal(made.velocity(made.transformer, x, t, cond), -expected)
    assert made.latent_shape(48, 48) == (4, 6, 6)
    assert made.latent_shape(32, 64) == (4, 4, 8)
    with pytest.raises(ValueError, match=r"at most 8 tokens of 16 x 16 .*32 x 80, which are 10"):
        made.latent_shape(32, 80)


def test_a_saved_network_is_the_stock_one(made: Any, tmp_path: Path) -> None:
    """Experts keep the names of diffusers' layer, and the configuration is as it was."""
    made.save(tmp_path)
    said = json.loads((tmp_path / "transformer/config.json").read_text())
    assert said["force_inference_output"] is False
    stock = several.hidream().transformer
    stock.load_state_dict(load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors"))
    x, t, cond = given(made, 4, 4)
    other: Any = backbones.load("hidream", "none", pipeline=several.hidream())
    other.restore(tmp_path)
    v = made.velocity(made.transformer, x, t, cond)
    assert torch.equal(other.velocity(other.transformer, x, t, cond), v)
