"""Families that edit images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image

from sfgrpo.processors import OF_IMAGES
from tests.support.families import images
from tests.support.families.parts import PACKED, Family, byte_tokenizer, diffusers, true_cfg

WIDE, TALL = (32, 48), (80, 64)
"""Height and width to which images are resized; FLUX.2 refuses sides below 64."""
IMAGE = "<|image_pad|>"
"""Qwen2-VL's token for a part of an image."""


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


def qwen(made: str, **more: Any) -> Any:
    """A pipeline of Qwen-Image's networks that edits, `made` the name of its class; 2511's network
    has `zero_cond_t`."""
    pipeline = getattr(diffusers, made)(**images.qwenimage(**more).components, processor=None)
    tokenizer = byte_tokenizer(f"{IMAGE} <|video_pad|> {pipeline.prompt_template_encode}")
    place = tokenizer.convert_tokens_to_ids(IMAGE)
    reader = transformers.Qwen2VLImageProcessorPil(max_pixels=84 * 84)
    pipeline.register_modules(
        tokenizer=tokenizer, text_encoder=images.qwen_vl(400, image_token_id=place),
        processor=OF_IMAGES["Qwen2VLProcessor"](reader, tokenizer),
    )  # fmt: skip
    # As published folders say, which were written beside torchvision.
    pipeline.register_to_config(processor=("transformers", "Qwen2VLProcessor"))
    return pipeline


def sized(module: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Where a stock pipeline resizes images to `WIDE` for its autoencoder: to a megapixel, its code
    says."""
    stock = module.calculate_dimensions

    def found(area: int, ratio: float) -> Any:
        wide, high, *rest = stock(area, ratio)
        return (*WIDE[::-1], *rest) if area == 1024 * 1024 else (wide, high, *rest)

    return lambda: mock.patch.object(module, "calculate_dimensions", found)


QWEN: dict[str, Any] = {
    "guided": true_cfg, "length": 512, "options": {"image_resolution": WIDE}, "one_by_one": True,
    "given_parts": lambda folder: {
        "processor": OF_IMAGES["Qwen2VLProcessor"].from_pretrained(folder / "processor")
    }, **PACKED,
}  # fmt: skip
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
        shown=references, taken=images.flux2_latents, given_parts=images.bare_tokenizer,
    ),
    "flux2-klein-edit": Family(
        build=images.klein, backbone="flux2_edit", length=96, images=1,
        options={"image_resolution": TALL}, one_by_one=True, shown=references,
        guided=lambda scale: {"guidance_scale": scale}, taken=images.klein_latents, negative="",
    ),
    "qwenimage-edit": Family(
        build=partial(qwen, "QwenImageEditPipeline"), backbone="qwenimage_edit", images=1,
        shown=lambda prompts: {"image": prompts[0][0]}, within=sized(edit), **QWEN,
    ),
    "qwenimage-edit-plus": Family(
        build=partial(qwen, "QwenImageEditPlusPipeline", zero_cond_t=True), images=2,
        backbone="qwenimage_edit_plus", shown=lambda prompts: {"image": [*prompts[0]]},
        within=sized(edit_plus), **QWEN,
    ),
}  # fmt: skip
