"""HPSv3: what people prefer (Ma et al. 2025, arXiv 2508.03789).

Qwen2-VL (7B) reads an instruction with the prompt in it and sees the image; three layers make mean
and spread of a preference of the state at the token <|Reward|>, and the score is the mean: mostly 0
to 15.

The published weights are loaded into transformers' `Qwen2VLModel`. Images [B, 3, H, W] in [0, 1]
are resized on the device to about 256 x 28 x 28 pixels, as the published code does with Pillow, but
for its rounding to 8 bits. The instruction, hpsv3.txt, is the published one. Code and weights: MIT;
Qwen2-VL's: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sfgrpo.rewards import _qwen2_vl, _weights
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise, resize
from sfgrpo.rewards._qwen2_vl import Reader
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.base import Metadata, expect_images

INSTRUCTION = Path(__file__).with_suffix(".txt")
JUDGED = "<|Reward|>"
PIXELS = 256 * 28 * 28
HEAD = {"rm_head.0": "0", "rm_head.3": "2", "rm_head.5": "4"}
"""The published layers, between which there was dropout in training -> ours."""


def divide(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published state dict as Qwen2-VL's, under transformers' names, and the layers' on top."""
    network, head = {}, {}
    for name, value in state.items():
        owner, _, kind = name.rpartition(".")
        if owner in HEAD:
            head[f"{HEAD[owner]}.{kind}"] = value.float()
        else:
            network[name] = value
    return _qwen2_vl.renamed(network), head


class Hpsv3:
    """The mean of the preference that Qwen2-VL foresees."""

    def __init__(self, place: Place, *, reader: Reader, head: nn.Module) -> None:
        self._place, self._reader = place, reader
        self._head = head.to(place.device).eval().requires_grad_(False)
        self._text = INSTRUCTION.read_text(encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        found = [torch.empty(0, device=self._place.device)]
        for rows in self._place.batches(len(images)):
            found.append(self._scores(images[rows], prompts[rows]))
        return torch.cat(found)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        expect_images(images)
        size = _qwen2_vl.fitted(
            *images.shape[-2:], factor=self._reader.factor, least=PIXELS, most=PIXELS
        )
        shown = resize(images.detach().to(self._place.device), size).clamp(0, 1)
        still = normalise(shown, CLIP_MEAN, CLIP_STD)[:, None]
        texts = [self._text.replace("{prompt}", prompt) for prompt in prompts]
        video = still.expand(-1, self._reader.frames, -1, -1, -1)
        return self._head(self._reader(video, texts, prompts)[:, 0])[:, 0]


def build(
    *,
    model: Weights = "MizzenAI/HPSv3/HPSv3.safetensors",
    base: Settings = "Qwen/Qwen2-VL-7B-Instruct",
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    batch: int = 4,
) -> Hpsv3:
    """The HPSv3 reward.

    Args:
        model: a local file or "owner/name/file" on the hub, in the published names.
        base: local folder or hub id of Qwen2-VL's configuration and tokeniser.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of Qwen2-VL, published in bf16; the layers on top and scores are fp32.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, or weights that do not fit, naming them.
        OSError: where a file cannot be found.
    """
    place = Place.of("hpsv3", device=device, dtype=dtype, batch=batch)
    tokenizer = _qwen2_vl.open_tokenizer(base, [JUDGED])
    state, layers = divide(_weights.read("hpsv3", model))
    network = _qwen2_vl.assemble(place, model, base, state)
    width = network.config.text_config.hidden_size
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    _weights.fit("hpsv3", model, head, layers)
    reader = Reader(place, network=network, tokenizer=tokenizer, judged=[JUDGED], kind="image")
    return Hpsv3(place, reader=reader, head=head)
