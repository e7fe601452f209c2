"""HPSv3: what people prefer (Ma et al. 2025, arXiv 2508.03789).

Qwen2-VL (7B) reads an instruction with the prompt in it and sees the image; three layers make mean
and spread of a preference of the state at the token <|Reward|>, and the score is the mean: mostly 0
to 15.

The published weights are loaded into transformers' `Qwen2VLModel`. Images [B, 3, H, W] in [0, 1]
are resized on the device to about 256 x 28 x 28 pixels, as the published code does with Pillow, but
for its rounding to 8 bits. Text and image count their positions one by one: the published class
leaves out Qwen2-VL's positions in three directions. The instruction, hpsv3.txt, is the published
one. Code and weights: MIT; Qwen2-VL's: Apache-2.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfgrpo.rewards import _weights
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise, resize
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.base import Metadata

INSTRUCTION = Path(__file__).with_suffix(".txt")
TALK = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template of one question about one image."""
SEEN, JUDGED = "<|image_pad|>", "<|Reward|>"
PIXELS = 256 * 28 * 28
HEAD = {"rm_head.0": "0", "rm_head.3": "2", "rm_head.5": "4"}
"""The published layers, between which there was dropout in training -> ours."""


def fitted(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width of about `PIXELS` pixels, in multiples of `factor`: Qwen2-VL's way."""
    whole = [max(factor, round(side / factor) * factor) for side in (height, width)]
    ratio = math.sqrt(height * width / PIXELS)
    if math.prod(whole) > PIXELS:
        whole = [math.floor(side / ratio / factor) * factor for side in (height, width)]
    elif math.prod(whole) < PIXELS:
        whole = [math.ceil(side / ratio / factor) * factor for side in (height, width)]
    return whole[0], whole[1]


def patches(images: Tensor, *, patch: int, merge: int, frames: int) -> Tensor:
    """[B, 3, H, W] -> [B * patches, 3 * frames * patch * patch] in the order of Qwen2-VL: blocks of
    merge x merge patches, each pixel repeated as the `frames` that a patch of a video has."""
    rows, columns = (side // patch // merge for side in images.shape[-2:])
    cut = images.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, merge, merge, 3, p, p]
    repeated = ordered.flatten(0, 4)[:, :, None].expand(-1, -1, frames, -1, -1)
    return repeated.flatten(1)


def divide(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published state dict as Qwen2-VL's, under transformers' names, and the layers' on top."""
    network, head = {}, {}
    for name, value in state.items():
        owner, _, kind = name.rpartition(".")
        if owner in HEAD:
            head[f"{HEAD[owner]}.{kind}"] = value.float()
        elif name.startswith("model."):
            network[f"language_model.{name.removeprefix('model.')}"] = value
        elif name != "lm_head.weight":  # writes text, which is not asked for
            network[name] = value
    return network, head


class Hpsv3:
    """The mean of the preference that Qwen2-VL foresees."""

    def __init__(self, place: Place, *, network: Any, head: nn.Module, tokenizer: Any) -> None:
        self._place = place
        self._network = place.settle(network)
        self._head = head.to(place.device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._judged = tokenizer.convert_tokens_to_ids(JUDGED)
        self._text = INSTRUCTION.read_text(encoding="utf-8")
        vision = network.config.vision_config
        self._patch, self._merge = vision.patch_size, vision.spatial_merge_size
        self._frames = vision.temporal_patch_size

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        found = [torch.empty(0, device=self._place.device)]
        for rows in self._place.batches(len(images)):
            found.append(self._scores(images[rows], prompts[rows]))
        return torch.cat(found)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size = fitted(images.shape[-2], images.shape[-1], self._patch * self._merge)
        shown = resize(images.detach().to(self._place.device), size).clamp(0, 1)
        pixels = patches(
            normalise(shown, CLIP_MEAN, CLIP_STD), patch=self._patch, merge=self._merge,
            frames=self._frames,
        )  # fmt: skip
        grid = torch.tensor([[1, size[0] // self._patch, size[1] // self._patch]] * len(images))
        tokens = self._tokens(prompts, int(grid[0].prod()) // self._merge**2)
        places = torch.arange(tokens["input_ids"].shape[1], device=self._place.device)
        read = self._network(
            **tokens, pixel_values=pixels.to(self._place.dtype), use_cache=False,
            image_grid_thw=grid.to(self._place.device),
            position_ids=places.expand(3, len(images), -1),
        ).last_hidden_state  # fmt: skip
        return self._head(read[tokens["input_ids"] == self._judged].float())[:, 0]

    def _tokens(self, prompts: Sequence[str], seen: int) -> dict[str, Tensor]:
        """The whole talk of each prompt, with `seen` tokens of its image."""
        texts = [
            TALK.format(image=SEEN * seen, text=self._text.replace("{prompt}", prompt))
            for prompt in prompts
        ]
        tokens = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        judged = (tokens["input_ids"] == self._judged).sum(1)
        for prompt, count in zip(prompts, judged.tolist(), strict=True):
            if count != 1:
                raise ValueError(f"the prompt has {JUDGED} in it: {prompt!r}")
        return {k: tokens[k].to(self._place.device) for k in ("input_ids", "attention_mask")}


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
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

    place = Place.of("hpsv3", device=device, dtype=dtype, batch=batch)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([JUDGED], special_tokens=True)
    config: Any = Qwen2VLConfig.from_pretrained(base)
    state, layers = divide(_weights.read("hpsv3", model))
    words = state.get("language_model.embed_tokens.weight")
    if words is None:
        raise ValueError(f"reward 'hpsv3': '{model}' is no Qwen2-VL: no model.embed_tokens.weight")
    config.text_config.vocab_size = len(words)
    network = _weights.assemble(place, model, Qwen2VLModel, config, state)
    width = config.text_config.hidden_size
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    _weights.fit("hpsv3", model, head, layers)
    return Hpsv3(place, network=network, head=head, tokenizer=tokenizer)
