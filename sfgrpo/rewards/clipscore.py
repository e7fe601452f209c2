"""CLIPScore: whether image and prompt belong together, as CLIP sees it (Hessel et al. 2021, arXiv
2104.08718).

With c the cosine of the embeddings of image and text, two scores are published under this name:

    clipscore     2.5 max(c, 0), of the text "A photo depicts <prompt>": the paper's and its code's
    torchmetrics  100 c, of the prompt itself; torchmetrics' mean over images is cut at 0, c is not

Images are [B, 3, H, W] in [0, 1]; scores are mostly 0.3 to 1.0, or 10 to 40. The paper's numbers
are of ViT-B/32 (`model: openai/clip-vit-base-patch32`), torchmetrics' of the default here. Code and
weights of CLIP: MIT.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sfgrpo.rewards._clip import Clip, CosineReward
from sfgrpo.rewards._weights import Place, Settings, Weights

PREFIX = {"clipscore": "A photo depicts ", "torchmetrics": ""}


class ClipScore(CosineReward):
    """A multiple of the cosine of image and prompt."""

    def __init__(self, clip: Clip, *, scale: str, prefix: str) -> None:
        super().__init__(clip, prefix=prefix)
        self._scale = scale

    def _score(self, cosines: Tensor) -> Tensor:
        return 2.5 * cosines.clamp(min=0) if self._scale == "clipscore" else 100 * cosines


def build(
    *,
    model: Weights = "openai/clip-vit-large-patch14",
    processor: Settings | None = None,
    scale: Literal["clipscore", "torchmetrics"] = "clipscore",
    prefix: str | None = None,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> ClipScore:
    """The CLIPScore reward.

    Args:
        model: local folder or hub id of the CLIP model (safetensors).
        processor: of its tokeniser and image settings, if they are elsewhere.
        scale: whose score, of those above.
        prefix: what stands before each prompt; None is what the scale's authors put there.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of the network; scores are fp32.
        batch: images, or prompts, of one forward.

    Raises:
        ValueError: values that make no sense, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    if scale not in PREFIX:
        raise ValueError(f"reward 'clipscore': scale must be one of {list(PREFIX)}, got {scale!r}")
    place = Place.of("clipscore", device=device, dtype=dtype, batch=batch)
    # The paper's code prepares images with torchvision, torchmetrics with transformers.
    clip = Clip.load(place, model=model, processor=processor or model, rounds=scale == "clipscore")
    return ClipScore(clip, scale=scale, prefix=PREFIX[scale] if prefix is None else prefix)
