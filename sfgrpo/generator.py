"""A recipe's generator: which options of a backbone its keys are, and the prompts that suit it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sfgrpo import backbones, prompts
from sfgrpo.backbones.base import DTYPES
from sfgrpo.config import Recipe
from sfgrpo.names import in_one_line
from sfgrpo.prompts import Prompt, Split, images

Shape = tuple[int, ...]
PIPELINE = (
    "max_sequence_length", "attention", "compile_blocks", "decode_batch", "vae_tiling",
    "vae_slicing", "text_encoders", "context_parallel",
)  # fmt: skip
"""Keys of `model` that are options of every family; their names are the same."""


def options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to its backbone's `load` beside path and device; to a backbone of one's
    own, the dtype alone."""
    model = recipe.model
    found: dict[str, Any] = {"dtype": DTYPES[model.dtype]}
    if ":" not in model.backbone:
        found |= {name: getattr(model, name) for name in PIPELINE}
        found["embedded_guidance"] = recipe.sample.embedded_guidance
        if backbones.takes_images(model.backbone)[-1]:
            found["image_resolution"] = model.image_size
    return found


def check_context(recipe: Recipe, world: int) -> None:
    """ValueError unless ranks, of `world`, can share the sequences of the recipe's family as it
    asks; nothing is loaded."""
    model = recipe.model
    if model.context_parallel == 1:
        return
    if why := _whole(model.backbone):
        able = ", ".join(name for name in backbones.available() if not _whole(name))
        raise ValueError(
            f"model.context_parallel: ranks cannot share sequences of backbone '{model.backbone}': "
            f"{why}; use 1, or one of {able}"
        )
    if world % model.context_parallel:
        raise ValueError(
            f"model.context_parallel: {world} rank(s) do not divide into groups of "
            f"{model.context_parallel}; start a multiple of that, or use 1"
        )


def _whole(name: str) -> str:
    """Why ranks cannot share the sequences of a backbone of this package; "" if they can."""
    return getattr(backbones.family(name), "whole_sequences", "")


def prompts_of(recipe: Recipe) -> Split:
    """The recipe's prompts, with as many images each as its backbone takes; nothing is loaded.

    Warns of prompts that name images where the backbone takes none: rewards may want them, as for
    likeness to a subject, and so may captioned pictures be trained on.

    Raises:
        ValueError: what is wrong with the prompts, or their images, naming the key or the row.
    """
    model = recipe.model
    counts = backbones.takes_images(model.backbone)
    prepared_size = getattr(backbones.family(model.backbone), "prepared_size", None)
    if model.image_resolution is not None and prepared_size is None:
        what = "resizes images itself" if counts[-1] else "takes no images"
        raise ValueError(f"model.image_resolution: backbone '{model.backbone}' {what}; use null")
    found = prompts.split(
        recipe.prompts, prompts_from=recipe.eval.prompts_from, held_out=recipe.eval.held_out,
        pictures=counts,
    )  # fmt: skip
    named = [prompt for prompt in found.all if not prompt.images and images.KEY in prompt.metadata]
    if named:
        warnings.warn(
            f"{named[0].where or recipe.prompts}: backbone '{model.backbone}' takes no images, so "
            f"'{images.KEY}' of {len(named)} prompts is seen by rewards alone",
            stacklevel=2,
        )
    if recipe.eval_size != model.size and any(prompt.images for prompt in found.all):
        raise ValueError(
            "eval.resolution and eval.num_frames: images of prompts are prepared for the size of "
            "training; use null, and `sfgrpo evaluate RUN --model.resolution` for another"
        )
    if prepared_size is not None:

        def sizes(prompt: Prompt) -> list[tuple[int, int]]:
            given = (model.image_size or images.size(source)[::-1] for source in prompt.images)
            try:
                return [prepared_size(*sides) or model.size[:2] for sides in given]
            except ValueError as error:
                raise ValueError(f"{prompt.where}: {error}") from None

        _check_alike(found.all, sizes)
    return found


def _check_alike(found: Sequence[Prompt], sizes: Callable[[Prompt], Any]) -> None:
    """ValueError unless what prompts' images are resized to is the same for all: the rows of one
    forward are."""
    first = sizes(found[0])
    for prompt in found:
        if sizes(prompt) != first:
            here, there = (
                " and ".join(f"{height} x {width}" for height, width in some) or "none"
                for some in (sizes(prompt), first)
            )
            raise ValueError(
                f"{prompt.where}: its images are resized to {here}, those of {found[0].where} to "
                f"{there} (height x width), and all must be as many and as large; set "
                "model.image_resolution, or cut them alike"
            )


def shapes(recipe: Recipe, backbone: backbones.Backbone) -> tuple[Shape, Shape]:
    """Shapes of the latents that training makes, and of those that evaluation does.

    Raises:
        ValueError: the backbone does not serve that size, naming the section that asks for it.
    """

    def shape(section: str, size: tuple[int, int, int]) -> Shape:
        try:
            return backbone.latent_shape(*size)
        except ValueError as error:
            raise ValueError(f"{section}.resolution, {section}.num_frames: {error}") from None

    return shape("model", recipe.model.size), shape("eval", recipe.eval_size)


def load(recipe: Recipe, device: torch.device | str, **instead: Any) -> backbones.Backbone:
    """The recipe's backbone; `instead` are options that replace the recipe's or add to them.

    Raises:
        OSError: names the folder or Hub id, and says where it was looked for.
        ValueError: options that the model or the device cannot serve, naming the key.
    """
    given = {**options(recipe), "device": device, **instead}
    model = recipe.model
    try:
        return backbones.load(model.backbone, model.path, options=model.options, **given)
    except OSError as error:
        there = Path(model.path).exists()
        hub = "" if there else f"there is no such folder in '{Path.cwd()}', and as a Hub id: "
        raise OSError(f"model.path '{model.path}': {hub}{in_one_line(error)}") from error
