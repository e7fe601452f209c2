"""HPSv2 and HPSv2.1: what people prefer (Wu et al. 2023, arXiv 2306.09341).

CLIP ViT-H/14 fine-tuned on choices between images of a prompt; the score is the cosine of the
embeddings of image and prompt, mostly 0.2 to 0.35. There is no factor of 100 and no learnt scale in
it: `hpsv2.score` returns the cosine.

The weights are published in open_clip's format and are loaded into transformers' `CLIPModel`.
Images [B, 3, H, W] in [0, 1] are prepared as the published code does it: the longer side resized to
the network's 224 pixels (bicubic, not cut to [0, 1]), the rest black. It resizes tensors, not
Pillow's images: torchvision did that without antialiasing up to its version 0.16, and with it
since; `antialias` chooses. Code and weights: Apache-2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards import _open_clip, _weights
from sfgrpo.rewards._clip import Clip, CosineReward
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise
from sfgrpo.rewards._weights import Place, Settings, Weights

HEADS = (64, 80)
"""Channels of one attention head, of ViT-H/14's text and image tower."""


@dataclass(frozen=True)
class Padded:
    """The longer side to `side` pixels, the shorter one padded with black to as much."""

    side: int
    antialias: bool

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, side, side] fp32, normalised."""
        height, width = images.shape[-2:]
        scale = self.side / max(height, width)
        size = [round(height * scale), round(width * scale)]
        fitted = images.float()
        if size != [height, width]:
            fitted = F.interpolate(
                fitted, size=size, mode="bicubic", antialias=self.antialias, align_corners=False
            )
        lower, right = self.side - size[0], self.side - size[1]
        margins = (right // 2, right - right // 2, lower // 2, lower - lower // 2)
        return normalise(F.pad(fitted, margins), CLIP_MEAN, CLIP_STD)


def build(
    *,
    model: Weights = "xswu/HPSv2/HPS_v2.1_compressed.pt",
    processor: Settings = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    antialias: bool = True,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> CosineReward:
    """The HPSv2 reward.

    Args:
        model: a local file or "owner/name/file" on the hub, in open_clip's names: the published
            pickle (HPS_v2_compressed.pt is version 2.0), or safetensors.
        processor: local folder or hub id of the tokeniser.
        antialias: whether images are resized as by torchvision since 0.17.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of the network; scores are fp32.
        batch: images, or prompts, of one forward.

    Raises:
        ValueError: values that make no sense, or weights that are no CLIP, naming them.
        OSError: where a file cannot be found.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    place = Place.of("hpsv2", device=device, dtype=dtype, batch=batch)
    tokenizer: Any = AutoTokenizer.from_pretrained(processor)
    state = _weights.read("hpsv2", model)
    try:
        settings = _open_clip.settings(state, eos=tokenizer.eos_token_id, heads=HEADS)
        state = _open_clip.translate(state)
    except KeyError as error:
        raise ValueError(
            f"reward 'hpsv2': '{model}' is no CLIP of open_clip: {error.args[0]}"
        ) from error
    config = CLIPConfig(**settings)
    network = _weights.assemble(place, model, CLIPModel, config, state)
    preprocess = Padded(settings["vision_config"]["image_size"], antialias)
    return CosineReward(Clip(place, network=network, tokenizer=tokenizer, preprocess=preprocess))
