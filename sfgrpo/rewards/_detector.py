"""Objects in images, by any of transformers' detectors of a closed set of classes.

Two kinds: instance segmentation (Mask2Former, MaskFormer), whose boxes are those around the masks,
and boxes alone (DETR, RT-DETR, YOLOS, ...). Images are prepared by the detector's own processor,
from 8 bits, since every detector has its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfgrpo.rewards._pixels import to_bytes
from sfgrpo.rewards._weights import Place

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""
MOST = 100
"""Instances of an image that are looked at, as in mmdetection's settings for COCO."""


@dataclass(frozen=True)
class Found:
    """An object."""

    box: Box
    score: float
    mask: Tensor | None = None
    """Its pixels, bool [H, W]; None from a detector of boxes."""


class Detector:
    """Finds the objects of each image, by class, the surest first."""

    def __init__(self, place: Place, *, model: str) -> None:
        """From a local folder or a hub id.

        Raises:
            ValueError: the model detects nothing.
            OSError: transformers' message, where it cannot be found or has no safetensors.
        """
        from transformers import (
            MODEL_FOR_OBJECT_DETECTION_MAPPING,
            MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
            AutoConfig,
            AutoImageProcessor,
        )

        config: Any = AutoConfig.from_pretrained(model)
        kinds = (MODEL_FOR_OBJECT_DETECTION_MAPPING, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING)
        boxes, masks = (kind.get(type(config), None) for kind in kinds)
        kind: Any = boxes or masks
        if kind is None:
            raise ValueError(
                f"reward '{place.reward}': '{model}' is of type {config.model_type}, expected a "
                "detector (Mask2Former, DETR, YOLOS, OWLv2, Grounding DINO, ...)"
            )
        network = kind.from_pretrained(model, dtype=place.dtype, use_safetensors=True)
        self._network: Any = place.settle(network)
        self._processor: Any = AutoImageProcessor.from_pretrained(model)
        self._masks = boxes is None
        self._place = place
        self.labels: list[str] = [config.id2label[n] for n in sorted(config.id2label)]

    @torch.no_grad()
    def __call__(
        self, images: Tensor, *, threshold: float, asked: Sequence[tuple[str, ...]] = ()
    ) -> list[dict[str, list[Found]]]:
        """What of [B, 3, H, W] in [0, 1] is surer than `threshold`, per image: class -> objects; of
        all classes, whichever are `asked` for."""
        size = (images.shape[-2], images.shape[-1])
        found = []
        for rows in self._place.batches(len(images)):
            given = self._processor(images=list(to_bytes(images[rows])), return_tensors="pt")
            given = {key: value.to(self._place.device) for key, value in given.items()}
            given["pixel_values"] = given["pixel_values"].to(self._place.dtype)
            outputs = self._network(**given)
            if self._masks:
                inside = given.get("pixel_mask", torch.ones_like(given["pixel_values"][:, 0]))
                objects = self._of_masks(outputs, inside, size, threshold)
            else:
                objects = found_boxes(self._processor, outputs, size, threshold)
            found += [by_class(each, self.labels) for each in objects]
        return found

    def _of_masks(
        self, outputs: Any, inside: Tensor, size: tuple[int, int], threshold: float
    ) -> list[list[tuple[int, Found]]]:
        """As mmdetection makes instances of Mask2Former's queries: the surest pairs of query and
        class, each by the probability of its class times the mean of its mask's pixels."""
        found = []
        for logits, masks, valid in zip(
            outputs.class_queries_logits, outputs.masks_queries_logits, inside, strict=True
        ):
            chances = logits.float().softmax(-1)[:, :-1]
            classes = chances.shape[1]
            sure, place = chances.flatten().topk(min(MOST, chances.numel()))
            picked = masks[place // classes].float()[None]
            height, width = int(valid.any(1).sum()), int(valid.any(0).sum())
            whole = _stretch(picked, tuple(valid.shape))[..., :height, :width]
            whole = _stretch(whole, size)[0]
            on = whole > 0
            level = (whole.sigmoid() * on).flatten(1).sum(1) / (on.flatten(1).sum(1) + 1e-6)
            scores = sure * level
            keep = ((scores > threshold) & on.flatten(1).any(1)).nonzero()[:, 0].tolist()
            found.append(
                [
                    (int(place[n]) % classes, Found(_around(on[n]), float(scores[n]), on[n].cpu()))
                    for n in keep
                ]
            )
        return found


def found_boxes(
    processor: Any, outputs: Any, size: tuple[int, int], threshold: float
) -> list[list[tuple[int, Found]]]:
    """What an image processor makes of logits and boxes, within images of this height and width:
    the number of its class and the object."""
    results = processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=[size] * len(outputs.logits)
    )
    limit = torch.tensor([size[1], size[0]] * 2)
    return [
        [
            (int(label), Found(_box(box.float().cpu().clamp(min=0).minimum(limit)), float(sure)))
            for label, box, sure in zip(it["labels"], it["boxes"], it["scores"], strict=True)
        ]
        for it in results
    ]


def by_class(objects: Sequence[tuple[int, Found]], labels: Sequence[str]) -> dict[str, list[Found]]:
    """Objects by the names of their classes, the surest first."""
    found: dict[str, list[Found]] = {}
    for label, each in sorted(objects, key=lambda pair: -pair[1].score):
        found.setdefault(labels[label], []).append(each)
    return found


def _stretch(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)


def _around(mask: Tensor) -> Box:
    """The box around a mask's pixels."""
    rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)


def _box(values: Tensor) -> Box:
    left, top, right, bottom = values.tolist()
    return left, top, right, bottom
