"""Generators by name: `load("sd3", path)` calls `sfgrpo.backbones.sd3.load(path)`.

    sd3                  Stable Diffusion 3 and 3.5, and the embedded models
    flux                 FLUX.1
    flux_kontext         FLUX.1 Kontext, which edits an image
    flux2                FLUX.2 dev and klein
    flux2_edit           FLUX.2 dev and klein with reference images
    chroma               Chroma
    lumina2              Lumina-Image 2.0
    krea2                Krea 2
    auraflow             AuraFlow
    cogview4             CogView4
    hidream              HiDream-I1
    hunyuanimage         HunyuanImage 2.1, guided without its guider's momentum
    sana                 SANA
    sana_video           SANA-Video
    qwenimage            Qwen-Image
    qwenimage21          Qwen-Image 2.1, from text
    qwenimage_edit       Qwen-Image-Edit, which edits an image
    qwenimage_edit_plus  Qwen-Image-Edit-2509 and 2511, of up to three images
    wan                  Wan 2.1 and 2.2, text to video
    wan_i2v              the same, image to video
    ltx                  LTX-Video
    ltx2                 LTX-2, with sound
    hunyuanvideo         HunyuanVideo
    hunyuanvideo15       HunyuanVideo 1.5
    zimage               Z-Image

A name with a colon, "package.module:function", is a backbone of one's own.

What they share: rows of one batch stand at noise levels and prompts of their own (that is how clean
estimates and training are batched); LoRA by peft or all weights; gradient checkpointing;
`model.compile_blocks`; `model.context_parallel`, ranks that share each sequence (flux, flux2,
qwenimage, wan and wan_i2v: `sfgrpo.backbones._context`); `model.vae_tiling`, `vae_slicing`;
`model.attention` ("native", "xformers", "flash", "sage", ... through diffusers' attention backends,
tried forward and backward before a run starts: one that cannot serve is an error that says why);
`model.text_encoders: offload`, or `model.prompt_cache`, with which all prompts are embedded before
the network is loaded, the text encoders leave memory, and the next run does not load them at all.
`sample.guidance_scale` is classifier-free guidance for every family, 1 for none (the
pipelines of Z-Image and Krea 2 count from 0), with `sample.negative_prompt`;
`sample.embedded_guidance` is what a distilled network is told.

A velocity network of one's own (a robot's policy, molecules) is ten lines, and the recipe's
`model.backbone` is then "my_robot:load":

    import torch
    from sfgrpo.backbones import ModuleBackbone


    class Policy(torch.nn.Linear):  # x [B, 4, 2], t [B], goal [B, 2] -> velocity (noise - data)
        def forward(self, x, t, goal):
            return super().forward(torch.cat([x.flatten(1), t[:, None], goal], 1)).view_as(x)


    def load(path, *, device, dtype):  # the recipe's model.backbone is "my_robot:load"
        goals = lambda prompts: torch.tensor([[float(n) for n in p.split()] for p in prompts])
        return ModuleBackbone(Policy(11, 8).to(device, dtype), shape=(4, 2), encode=goals)

benchmarks/claims/reach.py is a whole one, with its reward, judge and recipe; small policies bend
their paths in training, and `credit.solver: euler` follows them.

A model that edits an image, or starts a video from one, is an `ImageBackbone`: its `load` has the
attribute `takes_images`, a range of how many a prompt brings. One whose videos come with sound is a
`SoundBackbone`, and its `load` has the attribute `makes_sound`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.backbones._module import ModuleBackbone
from sfgrpo.backbones.base import (
    DTYPES,
    Backbone,
    Conditioning,
    ImageBackbone,
    Negative,
    SoundBackbone,
)
from sfgrpo.names import BACKBONE, OwnError, blaming_own

if TYPE_CHECKING:
    from sfgrpo.backbones._pipeline import PipelineBackbone

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "Backbone",
    "Conditioning",
    "ImageBackbone",
    "ModuleBackbone",
    "Negative",
    "SoundBackbone",
    "available",
    "family",
    "folder",
    "load",
    "makes_sound",
    "pipelines",
    "takes_images",
]

EMBEDDED = {
    name: Path(__file__).parents[1] / "embedded" / place
    for name, place in (("embedded", "model"), ("numbers", "numbers/model"))
}
"""The small models in this package, by what recipes call them; a folder of such a name is written
`./numbers`."""


METHODS = ("latent_shape", "sigmas", "encode", "velocity", "guide", "decode", "save", "restore")
"""Of a `Backbone`: they are looked for in what a function of the user's own returns."""


def available() -> list[str]:
    """Names of the backbones in this package, one per module."""
    return BACKBONE.names()


def load(
    name: str, path: str | Path, *, options: Mapping[str, Any] | None = None, **settings: Any
) -> Backbone:
    """Load the weights at `path` (a folder, a Hub id, one of `EMBEDDED`) with backbone `name`.

    Args:
        options: the recipe's `model.options`, checked against the signature of the backbone's own
            `load`.
        settings: its other arguments; those of the families are listed at
            `sfgrpo.backbones._pipeline.PipelineBackbone.load`.

    Raises:
        ValueError: unknown name, or options that the model cannot serve; the function of this name
            returned no backbone.
    """
    function = BACKBONE.bind(name, options, supplied=settings)
    with blaming_own(name, OwnError, f"model.backbone '{name}' failed"):
        made = function(path, **settings)
    if missing := [method for method in METHODS if not hasattr(made, method)]:
        raise ValueError(
            f"model.backbone '{name}' returned a {type(made).__name__}, which has no "
            f"method '{missing[0]}', so is no backbone; a network of your own is returned as "
            "ModuleBackbone(network, shape=..., encode=...)"
        )
    return made


def pipelines(name: str) -> list[str]:
    """Names of the diffusers pipelines that the backbone `name` of this package serves."""
    found = importlib.import_module(f"{__name__}.{name}").load.__self__
    return [made.__name__ for made in found.pipeline_classes]


def family(name: str) -> type[PipelineBackbone] | None:
    """The class behind a backbone of this package; None for one of the user's own.

    Raises:
        ValueError: no backbone of this name, or its module cannot be imported.
    """
    return getattr(BACKBONE.resolve(name), "__self__", None)


def takes_images(name: str) -> range:
    """How many images a prompt may bring to the backbone `name`; it is imported, and not loaded.

    Raises:
        ValueError: as `family`.
    """
    return getattr(family(name) or BACKBONE.resolve(name), "takes_images", range(1))


def makes_sound(name: str) -> bool:
    """Whether the backbone `name` makes sound; it is imported, and not loaded.

    Raises:
        ValueError: as `family`.
    """
    return getattr(family(name) or BACKBONE.resolve(name), "makes_sound", False)


def folder(path: str | Path) -> Path:
    """The folder on this disk of a pipeline that `load` would load; downloads one of the Hub."""
    if str(path) in EMBEDDED:
        return EMBEDDED[str(path)]
    if Path(path).is_dir():
        return Path(path)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return Path(DiffusionPipeline.download(path))
