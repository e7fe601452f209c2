"""Families that edit images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from tests.support.families import images
from tests.support.families.parts import PACKED, Family, diffusers, true_cfg

WIDE, TALL = (32, 48), (80, 64)
"""Height and width to which images are resized; FLUX.2 refuses sides below 64."""


def resized(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    height, width = sides
    return image.resize((width, height), Image.Resampling.LANCZOS)


def kontext() -> Any:
    """FLUX.1-Kontext-dev: the networks of FLUX.1-dev."""
    parts = images.flux().components
    return diffusers.FluxKontextPipeline(**parts)


def references(prompts: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """Of one prompt: FLUX.2's pipeline gives all prompts the same images."""
    (pictures,) = prompts
    return {"image": [resized(image, TALL) for image in pictures]}


FAMILIES = {
    "flux-kontext": Family(
        build=kontext, backbone="flux_kontext", embedded_guidance=3.5, guided=true_cfg, images=1,
        options={"image_resolution": WIDE},
        stock={"guidance_scale": 3.5, "max_area": 32 * 32, "_auto_resize": False},
        shown=lambda prompts: {"image": [resized(image, WIDE) for (image,) in prompts]}, **PACKED,
    ),
    "flux2-edit": Family(
        build=images.flux2, backbone="flux2_edit", embedded_guidance=4.0, length=512, images=2,
        options={"image_resolution": TALL}, one_by_one=True, stock={"guidance_scale": 4.0},
        shown=references, taken=images.flux2_latents,
    ),
    "flux2-klein-edit": Family(
        build=images.klein, backbone="flux2_edit", length=96, images=1,
        options={"image_resolution": TALL}, one_by_one=True, shown=references,
        guided=lambda scale: {"guidance_scale": scale}, taken=images.klein_latents, negative="",
    ),
}  # fmt: skip
