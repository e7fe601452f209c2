"""Objects in images, by transformers' detectors that are told in words what to look for: OWL-ViT,
OWLv2, Grounding DINO.

An image is asked for all of its classes at once, and an object is of the class that fits it best.
OWL is asked for "a photo of a CLASS", as it was trained, and gives each class a score. Grounding
DINO reads "CLASS. CLASS." and scores tokens, of which a class has the mean of its own: as its
authors evaluate it on COCO. A box that overlaps a surer one of its class by more than `OVERLAP` is
the same object seen twice, and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfgrpo.rewards._detector import Box, Found, by_class, found_boxes
from sfgrpo.rewards._pixels import to_bytes
from sfgrpo.rewards._weights import Place

OVERLAP = 0.5
"""Intersection over union."""
WORDED = ("owlvit", "owlv2")
SPANNED = ("grounding-dino", "mm-grounding-dino")


def knows(model: str) -> bool:
    """Whether a local folder or a hub id holds one of these detectors."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).model_type in WORDED + SPANNED


class ZeroShot:
    """Finds the objects of each image that it is asked for, by class, the surest first."""

    labels = None
    """It knows no fixed set of classes."""

    def __init__(self, place: Place, *, model: str) -> None:
        """From a local folder or a hub id; OSError, transformers' message, where it cannot be found
        or has no safetensors."""
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        network = AutoModelForZeroShotObjectDetection.from_pretrained(
            model, dtype=place.dtype, use_safetensors=True
        )
        self._network: Any = place.settle(network)
        self._processor: Any = AutoProcessor.from_pretrained(model)
        self._spans = self._network.config.model_type in SPANNED
        self._place = place

    @torch.no_grad()
    def __call__(
        self, images: Tensor, *, threshold: float, asked: Sequence[tuple[str, ...]]
    ) -> list[dict[str, list[Found]]]:
        """What of [B, 3, H, W] in [0, 1] is surer than `threshold`, per image: class -> objects.

        Args:
            asked: the classes to look for in each image; images with the same go together.
        """
        found: dict[int, dict[str, list[Found]]] = {}
        for names in dict.fromkeys(asked):
            rows = [row for row, each in enumerate(asked) if each == names]
            for part in self._place.batches(len(rows)):
                objects = self._find(images[rows[part]], names, threshold)
                found |= dict(zip(rows[part], objects, strict=True))
        return [found[row] for row in range(len(images))]

    def _find(
        self, images: Tensor, names: Sequence[str], threshold: float
    ) -> list[dict[str, list[Found]]]:
        """The objects of images that are asked for the same."""
        text: Any = [f"a photo of a {name}" for name in names]
        if self._spans:
            text = "".join(f"{name.lower()}. " for name in names).rstrip()
        given = self._processor(
            images=list(to_bytes(images)), text=[text] * len(images), return_tensors="pt"
        ).to(self._place.device)
        given["pixel_values"] = given["pixel_values"].to(self._place.dtype)
        outputs = self._network(**given)
        if self._spans:
            outputs.logits = self._of_classes(outputs.logits, names, text)
        size = (images.shape[-2], images.shape[-1])
        processor = self._processor.image_processor
        return [
            {name: once(objects) for name, objects in by_class(each, names).items()}
            for each in found_boxes(processor, outputs, size, threshold)
        ]

    def _of_classes(self, logits: Tensor, names: Sequence[str], text: str) -> Tensor:
        """Logits [B, Q, tokens] -> [B, Q, classes]."""
        places = self._processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        chances, means, start = logits.float().sigmoid(), [], 0
        for name in names:
            end = start + len(name)
            own = [n for n, (a, b) in enumerate(places) if start <= a < b <= end]
            means.append(chances[..., own].mean(-1))
            start = end + len(". ")
        return torch.stack(means, -1).logit()


def once(objects: Sequence[Found]) -> list[Found]:
    """Without those that overlap a surer one, of objects of which the surest come first."""
    kept = list[Found]()
    for each in objects:
        if all(overlap(each.box, other.box) <= OVERLAP for other in kept):
            kept.append(each)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    both = width * height
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / whole if whole else 0.0
