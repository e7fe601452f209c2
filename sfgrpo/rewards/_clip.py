"""Images and texts in CLIP's common space, for the rewards that are made of cosines there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards._pixels import Preprocess
from sfgrpo.rewards._weights import Place
from sfgrpo.rewards.base import Metadata


class Clip:
    """A CLIP network with its tokeniser and its way of preparing images.

    Embeddings are fp32 and of unit length.
    """

    def __init__(
        self, place: Place, *, network: Any, tokenizer: Any, preprocess: Callable[[Tensor], Tensor]
    ) -> None:
        self.place = place
        self._network = place.settle(network)
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._length = network.config.text_config.max_position_embeddings

    @classmethod
    def load(cls, place: Place, *, model: str, processor: str, rounds: bool = False) -> Clip:
        """From local folders or hub ids.

        Args:
            rounds: whether the centre of an image is torchvision's (`Preprocess.rounds`).

        Raises:
            ValueError: the model is none of CLIP's kind, or images are prepared otherwise.
            OSError: transformers' message, where one cannot be found or has no safetensors.
        """
        from transformers import AutoModel, AutoProcessor

        # Weights in pickles could run code.
        network = AutoModel.from_pretrained(model, dtype=place.dtype, use_safetensors=True)
        if not hasattr(network, "logit_scale") or not hasattr(network, "get_text_features"):
            raise ValueError(
                f"reward '{place.reward}': '{model}' is a {type(network).__name__}, expected a "
                "CLIP model"
            )
        both: Any = AutoProcessor.from_pretrained(processor)
        try:
            preprocess = replace(Preprocess.of(both.image_processor, processor), rounds=rounds)
        except ValueError as error:
            raise ValueError(f"reward '{place.reward}': {error}") from error
        return cls(place, network=network, tokenizer=both.tokenizer, preprocess=preprocess)

    @property
    def scale(self) -> Tensor:
        """What the network learnt to multiply cosines by, fp32."""
        return self._network.logit_scale.float().exp()

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self._network.config.projection_dim

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each image [B, 3, H, W] and its prompt, [B] fp32 on the network's device."""
        # The images of a group share their prompt.
        texts = list(dict.fromkeys(prompts))
        row = {text: index for index, text in enumerate(texts)}
        of_text = self.texts(texts)[[row[prompt] for prompt in prompts]]
        return (self.images(images) * of_text).sum(1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D]; what is longer than the network reads is cut."""
        return self._embed(texts, self._text)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        return self._embed(images, self._image)

    def warn_of_cut(self, texts: Sequence[str]) -> None:
        """Warn of texts whose end the network will not see."""
        texts = list(dict.fromkeys(texts))
        if not texts:
            return
        cut = sum(len(ids) > self._length for ids in self._tokenizer(texts)["input_ids"])
        if cut:
            warnings.warn(
                f"reward '{self.place.reward}': {cut} of {len(texts)} prompts are longer than the "
                f"{self._length} tokens that the model reads; their ends do not count",
                stacklevel=3,
            )

    @torch.no_grad()
    def _embed(self, items: Any, embed: Callable[[Any], Any]) -> Tensor:
        parts = [embed(items[rows]) for rows in self.place.batches(len(items))]
        if not parts:
            return torch.empty(0, self.width, device=self.place.device)
        return F.normalize(torch.cat(parts).float(), dim=1)

    def _text(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        given = {key: tokens[key].to(self.place.device) for key in ("input_ids", "attention_mask")}
        return _pooled(self._network.get_text_features(**given))

    def _image(self, images: Tensor) -> Tensor:
        pixels = self._preprocess(images.detach().to(self.place.device)).to(self.place.dtype)
        return _pooled(self._network.get_image_features(pixel_values=pixels))


class CosineReward:
    """A reward that follows from the cosine of image and prompt; here the cosine itself."""

    def __init__(self, clip: Clip, *, prefix: str = "") -> None:
        """`prefix` stands before each prompt."""
        self._clip = clip
        self._prefix = prefix

    def _score(self, cosines: Tensor) -> Tensor:
        return cosines

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        return self._score(self._clip.cosines(images, self._texts(prompts)))

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Warn of prompts whose end the model will not see."""
        self._clip.warn_of_cut(self._texts(prompts))

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        return [self._prefix + prompt for prompt in prompts]


def _pooled(features: Any) -> Tensor:
    """transformers' fifth version wraps the projected embedding."""
    return features if isinstance(features, Tensor) else features.pooler_output
