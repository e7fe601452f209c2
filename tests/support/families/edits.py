"""Families that edit images."""

from __future__ import annotations

from typing import Any

from PIL import Image

from tests.support.families import images
from tests.support.families.parts import Family, diffusers, true_cfg

WIDE = (32, 48)
"""Height and width to which references are resized."""


def resized(image: Image.Image) -> Image.Image:
    height, width = WIDE
    return image.resize((width, height), Image.Resampling.LANCZOS)


def kontext() -> Any:
    """FLUX.1-Kontext-dev: the networks of FLUX.1-dev."""
    parts = images.flux().components
    return diffusers.FluxKontextPipeline(**parts)


FAMILIES = {
    "flux-kontext": Family(
        build=kontext, backbone="flux_kontext", embedded_guidance=3.5, guided=true_cfg, images=1,
        options={"image_resolution": WIDE},
        stock={"guidance_scale": 3.5, "max_area": 32 * 32, "_auto_resize": False},
        shown=lambda prompts: {"image": [resized(image) for (image,) in prompts]},
    ),
}  # fmt: skip
