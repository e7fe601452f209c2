"""A recipe's pipeline without weights: built from configurations, on the meta device.

A hub id that this package knows (`sfgrpo.doctor.published`) and the embedded models need no network
connection; a folder is read from its own configuration files, another hub id from those of the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sfgrpo import backbones, generator
from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import DTYPES
from sfgrpo.config import Recipe
from sfgrpo.doctor import published


class NoPipeline(ValueError):
    """The recipe's backbone is one of the user's own, of which nothing is known here."""


def configuration(path: str) -> published.Published:
    """The configurations behind a recipe's `model.path`.

    Raises:
        OSError: says where a folder or hub id was looked for.
    """
    if path in backbones.EMBEDDED or Path(path).is_dir():
        return published.describe(backbones.folder(path))
    return published.find(path) or published.describe(path)


def skeleton(recipe: Recipe) -> PipelineBackbone:
    """The recipe's backbone on the meta device, its network prepared for training.

    Raises:
        NoPipeline: the backbone is "module:function".
        OSError: the model's configuration files are not at hand.
        ValueError: the recipe does not fit the model.
    """
    from sfgrpo.policy import add_lora

    model = recipe.model
    if ":" in model.backbone:
        raise NoPipeline(
            f"model.backbone: the memory of '{model.backbone}' is not estimated; that is done from "
            "the configuration files of diffusers pipelines alone"
        )
    pipeline: Any = configuration(model.path).build(DTYPES[model.dtype])
    for name in cast(Any, backbones.family(model.backbone)).decoders:
        nn.Module.to(getattr(pipeline, name), torch.float32)
    backbone = generator.load(recipe, "meta", pipeline=pipeline, compile_blocks=False)
    if isinstance(backbone, ImagesBackbone):
        backbone.sample_size = model.size
    network = backbone.transformer.train()
    network.requires_grad_(recipe.lora is None)
    if recipe.lora:
        with torch.device("meta"), published.Unfilled():
            add_lora(network, recipe.lora, backbone.lora_targets)
        # On other devices peft gives adapters the dtype of the layer they stand beside.
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[model.dtype])
    return cast(PipelineBackbone, backbone)


def fake(mode: FakeTensorMode, networks: Iterable[nn.Module]) -> None:
    """Replace meta parameters and buffers by fake ones, which claim to lie on the CPU."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def change(value: Tensor) -> Tensor:
        if id(value) not in made:  # tied weights stay tied
            bare = FakeTensor(mode, value.detach().to("meta"), torch.device("cpu"))
            is_parameter = isinstance(value, nn.Parameter)
            new = nn.Parameter(bare, requires_grad=value.requires_grad) if is_parameter else bare
            made[id(value)] = (new, value)
        return made[id(value)][0]

    for network in networks:
        for module in network.modules():
            for store in (module._parameters, module._buffers):
                present = {name: value for name, value in store.items() if value is not None}
                store.update({name: change(value) for name, value in present.items()})  # pyright: ignore[reportCallIssue, reportArgumentType]


def embed(backbone: PipelineBackbone, encoder: Any, prompts: int) -> None:
    """Run one text encoder on as many tokens as the pipeline gives it, and as the pipeline does."""
    config = encoder.config
    if isinstance(encoder, LTX2TextConnectors):  # on the states of all layers of the one before
        length, width = backbone.max_sequence_length, config.caption_channels
        states = torch.zeros(prompts, length, width * config.text_proj_in_factor).to(encoder.dtype)
        with torch.no_grad():
            encoder(states, torch.ones(prompts, length, dtype=torch.int64))
        return
    if encoder.main_input_name == "pixel_values":  # one prompt's image after the other
        with torch.no_grad():
            pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=encoder.dtype)
            encoder(pixel_values=pixels, output_hidden_states=True)
        return
    is_clip, is_t5 = (name in config.model_type for name in ("clip", "t5"))
    options = {} if is_clip or is_t5 else {"use_cache": False}
    ids = torch.zeros(prompts, backbone.tokens_read(encoder), dtype=torch.int64)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        encoder(input_ids=ids, attention_mask=mask, output_hidden_states=not is_t5, **options)
