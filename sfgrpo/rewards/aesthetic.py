"""LAION's aesthetic predictor: how much people like an image, whatever the prompt.

The "improved" predictor (C. Schuhmann 2022, sac+logos+ava1-l14-linearMSE), which DDPO and Flow-GRPO
reward with: CLIP ViT-L/14's embedding of the image at unit length, then five linear layers
(768-1024-128-64-16-1; published without activations between them). It was trained on votes from 1
to 10, and most images score 4 to 7. Images are [B, 3, H, W] in [0, 1].

The layers are published as a pickle; of one, nothing but tensors is read. Code and weights of the
predictor: Apache-2.0; CLIP: MIT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sfgrpo.rewards import _weights
from sfgrpo.rewards._clip import Clip
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.base import Metadata

PREFIX = "layers."


def linear_layers(width: int) -> nn.Sequential:
    """The predictor's head over embeddings of `width`; ImageReward's has the same layers. Where
    there was dropout in training there is nothing, under the same numbers."""
    nothing = nn.Identity
    return nn.Sequential(
        nn.Linear(width, 1024), nothing(),
        nn.Linear(1024, 128), nothing(),
        nn.Linear(128, 64), nothing(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )  # fmt: skip


class Aesthetic:
    """Linear layers over CLIP's embedding of the image."""

    def __init__(self, clip: Clip, head: nn.Module) -> None:
        self._clip = clip
        self._head = head

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self._head(self._clip.images(images))[:, 0]


def named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names without what they all begin with."""
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def build(
    *,
    model: Weights = "openai/clip-vit-large-patch14",
    head: Weights = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    processor: Settings | None = None,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> Aesthetic:
    """The aesthetic reward.

    Args:
        model: local folder or hub id of CLIP ViT-L/14 (safetensors).
        head: the linear layers, a local file or "owner/name/file" on the hub: safetensors, or a
            pickle such as sac+logos+ava1-l14-linearMSE.pth.
        processor: of the image settings, if they are elsewhere.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of CLIP; the layers and scores are fp32.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, or weights that do not fit, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    place = Place.of("aesthetic", device=device, dtype=dtype, batch=batch)
    clip = Clip.load(place, model=model, processor=processor or model)
    layers = linear_layers(clip.width)
    _weights.fit("aesthetic", head, layers, named(_weights.read("aesthetic", head)))
    return Aesthetic(clip, layers.to(place.device).eval().requires_grad_(False))
