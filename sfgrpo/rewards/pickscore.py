"""PickScore: what people prefer (Kirstain et al. 2023, arXiv 2305.01569).

A CLIP model (ViT-H/14) fine-tuned on half a million choices between two images of a prompt. With
e_i and e_t its embeddings and s its learnt scale, the score is exp(s) cos(e_i, e_t) / 26, as
Flow-GRPO divides it: mostly below 1.

Images stay tensors on the device: the processor's steps (resize the shorter side with antialiased
bicubic, crop the centre, normalise) are done here with its own sizes, mean and std. The processor
rounds to 8 bits after resizing, this does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.backbones.base import DTYPES
from sfgrpo.rewards.base import Metadata

DIVISOR = 26
BICUBIC = 3
"""Pillow's number of the filter."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What CLIP's processor does with an image."""

    shortest: int
    """Pixels of the shorter side after resizing."""
    crop: tuple[int, int]
    """Height and width of the cut out centre."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, source: str) -> Preprocess:
        """The settings of an image processor; ValueError for steps other than CLIP's."""
        shortest, crop = processor.size["shortest_edge"], processor.crop_size
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        off = [step for step in steps if not getattr(processor, step, False)]
        if off or not shortest or processor.resample != BICUBIC:
            raise ValueError(
                f"reward 'pickscore': '{source}' prepares images otherwise than CLIP "
                f"(size {processor.size}, resample {processor.resample}, switched off: {off})"
            )
        return cls(
            shortest=shortest, crop=(crop["height"], crop["width"]),
            mean=tuple(processor.image_mean), std=tuple(processor.image_std),
        )  # fmt: skip

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, *crop], normalised; of any floating type, computed in
        fp32."""
        height, width = images.shape[-2:]
        short = min(height, width)
        size = [self.shortest * side // short for side in (height, width)]
        if min(s - c for s, c in zip(size, self.crop, strict=True)) < 0:
            raise ValueError(f"reward 'pickscore': cannot cut {self.crop} out of {tuple(size)}")
        resized = F.interpolate(
            images.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = ((s - c) // 2 for s, c in zip(size, self.crop, strict=True))
        cut = resized[..., top : top + self.crop[0], left : left + self.crop[1]].clamp(0, 1)
        mean, std = (cut.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (cut - mean) / std


class PickScore:
    """exp(s) cos(image, prompt) / 26."""

    def __init__(
        self, *, model: str, processor: str, device: torch.device, dtype: torch.dtype, batch: int
    ) -> None:
        from transformers import AutoModel, AutoProcessor

        # Weights in pickles could run code.
        found = AutoModel.from_pretrained(model, dtype=dtype, use_safetensors=True)
        if not hasattr(found, "logit_scale") or not hasattr(found, "get_text_features"):
            raise ValueError(
                f"reward 'pickscore': '{model}' is a {type(found).__name__}, expected a CLIP model"
            )
        self._model: Any = found.to(device).eval().requires_grad_(False)
        both: Any = AutoProcessor.from_pretrained(processor)
        self._tokenizer = both.tokenizer
        self._preprocess = Preprocess.of(both.image_processor, processor)
        self._length = found.config.text_config.max_position_embeddings
        self._device, self._dtype, self._batch = device, dtype, batch

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if not len(images):
            return images.new_empty(0, dtype=torch.float32)
        # The images of a group share their prompt.
        texts = list(dict.fromkeys(prompts))
        row = {text: index for index, text in enumerate(texts)}
        of_text = self._embed(texts, self._text)[[row[prompt] for prompt in prompts]]
        cosine = (self._embed(images, self._image) * of_text).sum(1)
        return self._model.logit_scale.float().exp() * cosine / DIVISOR

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Warn of prompts whose end the model will not see."""
        texts = list(dict.fromkeys(prompts))
        cut = sum(len(ids) > self._length for ids in self._tokenizer(texts)["input_ids"])
        if cut:
            warnings.warn(
                f"reward 'pickscore': {cut} of {len(texts)} prompts are longer than the "
                f"{self._length} tokens that the model reads; their ends do not count",
                stacklevel=2,
            )

    def _embed(self, items: Any, embed: Any) -> Tensor:
        """Embeddings [B, D] of unit length, fp32, `batch` at a time."""
        parts = [
            embed(items[start : start + self._batch]) for start in range(0, len(items), self._batch)
        ]
        return F.normalize(torch.cat(parts).float(), dim=1)

    def _text(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        given = {key: tokens[key].to(self._device) for key in ("input_ids", "attention_mask")}
        return _pooled(self._model.get_text_features(**given))

    def _image(self, images: Tensor) -> Tensor:
        pixels = self._preprocess(images.detach().to(self._device)).to(self._dtype)
        return _pooled(self._model.get_image_features(pixel_values=pixels))


def _pooled(features: Any) -> Tensor:
    """transformers' fifth version wraps the projected embedding."""
    return features if isinstance(features, Tensor) else features.pooler_output


def build(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
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
    if dtype not in DTYPES:
        raise ValueError(f"reward 'pickscore': dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"reward 'pickscore': batch must be at least 1, got {batch}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return PickScore(
        model=model, processor=processor, device=torch.device(device), dtype=DTYPES[dtype],
        batch=batch,
    )  # fmt: skip
