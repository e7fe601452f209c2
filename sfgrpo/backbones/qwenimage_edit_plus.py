"""Qwen-Image-Edit-2509, 2511: edits an image, or makes one of up to three.

As `qwenimage_edit`, but that the text encoder sees smaller images, of 384 x 384 pixels in their own
proportions, each under its number.
"""

from __future__ import annotations

from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    QwenImageEditPlusPipeline,
    calculate_dimensions,
)

from sfgrpo.backbones.qwenimage_edit import QwenImageEditBackbone


class QwenImageEditPlusBackbone(QwenImageEditBackbone):
    """A QwenImageEditPlusPipeline."""

    pipeline_classes = (QwenImageEditPlusPipeline,)
    takes_images = range(1, 4)
    """As many as its publisher trained it for."""

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        wide, high = calculate_dimensions(CONDITION_IMAGE_SIZE, width / height)
        return high, wide


load = QwenImageEditPlusBackbone.load
