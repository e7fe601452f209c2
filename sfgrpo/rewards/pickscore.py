"""PickScore: what people prefer (Kirstain et al. 2023, arXiv 2305.01569).

A CLIP model (ViT-H/14) fine-tuned on half a million choices between two images of a prompt. With
e_i and e_t its embeddings and s its learnt scale, the score is exp(s) cos(e_i, e_t) / 26, as
Flow-GRPO divides it: mostly below 1.

Images [B, 3, H, W] in [0, 1] stay tensors on the device: the processor's steps (resize the shorter
side with antialiased bicubic, crop the centre, normalise) are done there with its own sizes, mean
and std. The processor rounds to 8 bits after resizing, this does not. Code and weights: MIT.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sfgrpo.rewards._clip import Clip, CosineReward
from sfgrpo.rewards._weights import Place, Settings, Weights

DIVISOR = 26


class PickScore(CosineReward):
    """exp(s) cos(image, prompt) / 26."""

    def _score(self, cosines: Tensor) -> Tensor:
        return self._clip.scale * cosines / DIVISOR


def build(
    *,
    model: Weights = "yuvalkirstain/PickScore_v1",
    processor: Settings = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> PickScore:
    """The PickScore reward.

    Args:
        model: local folder or hub id of the CLIP model (safetensors).
        processor: local folder or hub id of its tokeniser and image settings.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of the network; scores are fp32.
        batch: images, or prompts, of one forward.

    Raises:
        ValueError: values that make no sense, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    place = Place.of("pickscore", device=device, dtype=dtype, batch=batch)
    return PickScore(Clip.load(place, model=model, processor=processor))
