"""How much an image is still like the one it was made from: for edits, which change too much.

The cosine between the embeddings of the image and of its source in `metadata["image"]` (see
`sfgrpo.prompts.images`; of several sources the mean), in [-1, 1]: DreamBooth's DINO and CLIP-I
scores (Ruiz et al. 2023, arXiv 2208.12242) over whichever vision model is named. The default is
DINOv2, whose first token's state is compared; of a CLIP it is the projected embedding. Both see
images [B, 3, H, W] in [0, 1] through the model's own sizes, mean and std, on the device. Weights of
DINOv2: Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards import _sources
from sfgrpo.rewards._pixels import Preprocess, open_image
from sfgrpo.rewards._weights import Place, Settings, Weights
from sfgrpo.rewards.base import Metadata


class Similarity:
    """The cosine of the image and its source."""

    def __init__(self, place: Place, *, network: Any, preprocess: Preprocess, folder: Path) -> None:
        self._place = place
        self._network = place.settle(network)
        self._preprocess = preprocess
        self._folder = folder
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if not len(images):
            return torch.empty(0, device=self._place.device)
        named = [_sources.named(entry, self._folder) for entry in metadata]
        sources = torch.stack([
            torch.stack([self._source(source) for source in some]).mean(0) for some in named
        ])  # fmt: skip
        return (self._embed(images) * sources).sum(1)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError or FileNotFoundError for metadata that name no image."""
        _sources.check(metadata, self._folder)

    def _source(self, source: str) -> Tensor:
        """The embedding of a source, [D]; each is opened once."""
        if source not in self._known:
            self._known[source] = self._embed(open_image(source)[None])[0]
        return self._known[source]

    def _embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D] of unit length, fp32."""
        parts = [self._features(images[rows]) for rows in self._place.batches(len(images))]
        return F.normalize(torch.cat(parts).float(), dim=1)

    def _features(self, images: Tensor) -> Tensor:
        pixels = self._preprocess(images.detach().to(self._place.device)).to(self._place.dtype)
        if hasattr(self._network, "get_image_features"):
            found = self._network.get_image_features(pixel_values=pixels)
            return found if isinstance(found, Tensor) else found.pooler_output
        return self._network(pixel_values=pixels).last_hidden_state[:, 0]


def build(
    *,
    model: Weights = "facebook/dinov2-base",
    processor: Settings | None = None,
    folder: str = ".",
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch: int = 32,
) -> Similarity:
    """The reward of likeness to a source.

    Args:
        model: local folder or hub id of the vision model (safetensors): DINOv2, CLIP and the like.
        processor: of its image settings, if they are elsewhere.
        folder: what relative paths in the metadata start from.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of the network; scores are fp32.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    from transformers import AutoImageProcessor, AutoModel

    place = Place.of("similarity", device=device, dtype=dtype, batch=batch)
    network = AutoModel.from_pretrained(model, dtype=place.dtype, use_safetensors=True)
    source = processor or model
    try:
        preprocess = Preprocess.of(AutoImageProcessor.from_pretrained(source), source)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"reward 'similarity': {error}") from error
    return Similarity(place, network=network, preprocess=preprocess, folder=Path(folder))
