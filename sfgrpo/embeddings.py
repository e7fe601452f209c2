"""Prompts -> conditioning: embedded whenever asked for, or once for all and kept on disk.

With `model.prompt_cache` every prompt of a run is embedded before the network is loaded, so that
memory never holds text encoders and network together, and a run that finds all its prompts there
loads no text encoder at all.

A file holds one prompt's embedding without its padding, under a key of everything that decides it:
the text encoders' and tokenizers' files (see `sfgrpo.hashes`), the pipeline's class, length, dtype
and the libraries' versions; for images also what they hold, the files of what prepares them, and
the sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sfgrpo import backbones, engine, files, generator, hashes
from sfgrpo.backbones.base import Backbone, Conditioning, ImageBackbone, Negative
from sfgrpo.config import Recipe
from sfgrpo.prompts import Prompt, Split, images
from sfgrpo.rollout import batches

WRITTEN = 16
"""Prompts between two steps of the progress bar; what is written survives an interruption."""
Embed = Callable[[Sequence[Prompt]], Conditioning]
READ, PREPARE = ("text_encoder", "tokenizer"), ("vae", "image", "processor", "feature_extractor")
"""How the folders begin of what a prompt's text goes through, and its images beside that."""


def negatives(prompts: Sequence[Prompt], recipe: Recipe) -> list[Prompt]:
    """What guidance leads away from: one prompt for all; where they bring images, which stock
    pipelines keep for the unconditional half, one for each."""
    negative = Negative(recipe.sample.negative_prompt)
    if not any(prompt.images for prompt in prompts):
        return [Prompt(negative, {})]
    return [replace(prompt, text=negative) for prompt in prompts]


def encode(
    backbone: Backbone, size: tuple[int, int, int], prompts: Sequence[Prompt]
) -> Conditioning:
    """Embed prompts for samples of `size` (height, width, frames).

    Raises:
        OSError: an image was there when the run began, and is no longer.
    """
    texts = [prompt.text for prompt in prompts]
    if not any(prompt.images for prompt in prompts):
        return backbone.encode(texts)
    shown = [[images.opened(source) for source in prompt.images] for prompt in prompts]
    return cast(ImageBackbone, backbone).encode_with_images(texts, shown, size)


class Cache:
    """Embeddings of prompts on disk, one safetensors file each."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key` names the model; prompts of different models lie in different folders."""
        self.folder = folder / key[:32]

    def path(self, prompt: Prompt) -> Path:
        """Where the embedding of a prompt, and of its images, lies, if it does."""
        kind = ["negative"] if isinstance(prompt.text, Negative) else []
        decides = "\0".join([*kind, prompt.text, *map(images.content, prompt.images)])
        return self.folder / f"{hashlib.sha256(decides.encode()).hexdigest()}.safetensors"

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that are not there, each once, in their order."""
        distinct = {self.path(prompt): prompt for prompt in reversed(prompts)}
        return [prompt for path, prompt in reversed(distinct.items()) if not path.is_file()]

    def read(self, prompts: Sequence[Prompt], *, device: torch.device) -> Conditioning:
        """The conditioning of prompts that are there.

        Raises:
            ValueError: names a file that is damaged.
        """
        return Conditioning.cat([self._read(self.path(prompt)) for prompt in prompts]).to(device)

    def _read(self, path: Path) -> Conditioning:
        try:
            return Conditioning.of(load_file(path))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"prompt cache: '{path}' is damaged ({error}); delete it, and it is made anew"
            ) from error

    def write(self, prompts: Sequence[Prompt], found: Conditioning) -> None:
        """Keep the conditioning of `prompts`; a file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, (prompt, tokens) in enumerate(zip(prompts, found.unpadded(), strict=True)):
            whole = {name: part[row : row + 1] for name, part in found.tensors().items()}
            parts = {n: part for n, part in whole.items() if n != "mask"} | {"tokens": tokens[None]}
            with files.replacing(self.path(prompt)) as aside:
                save_file({name: part.cpu().contiguous() for name, part in parts.items()}, aside)


def open_cache(recipe: Recipe) -> Cache | None:
    """The cache that a recipe asks for, if it does."""
    model = recipe.model
    if model.prompt_cache is None:
        return None
    pictured = bool(backbones.takes_images(model.backbone)[-1])
    folder, parts = backbones.folder(model.path), READ + (PREPARE if pictured else ())
    described = {
        "files": fingerprint(folder, model.prompt_cache / "hashes", parts),
        "backbone": model.backbone,
        "length": model.max_sequence_length,
        "dtype": model.dtype,
        "libraries": [version("diffusers"), version("transformers")],
    }
    if pictured:
        described |= {"size": model.size, "images": model.image_size, "options": model.options}
    text = json.dumps(described, sort_keys=True)
    return Cache(model.prompt_cache, hashlib.sha256(text.encode()).hexdigest())


def backbone_of(
    recipe: Recipe, device: torch.device, found: Split, *, sharded: bool = False
) -> tuple[backbones.Backbone, Embed]:
    """The recipe's backbone, and what embeds its prompts; with a cache, all `found` are in it.

    `sharded`: an engine is to shard the network, by the weights that rank 0 reads; so no other rank
    does, and they stay on the host until then. A backbone of one's own is loaded as always, and
    looks at all prompts if it has a method `check` (`ModuleBackbone.check`).

    Raises:
        OSError: says where a folder or Hub id was looked for.
        ValueError: options that the model or the device cannot serve, naming the key; a prompt
            that a backbone of one's own refuses, naming its line; evaluation at another size than
            training by one that has no sizes.
    """
    cache, size = open_cache(recipe), recipe.model.size
    prompts = [*found.all]
    prompts += negatives(found.all, recipe) if recipe.sample.guidance_scale != 1 else []
    instead: dict[str, Any] = {}
    if sharded and ":" not in recipe.model.backbone:
        instead["weights"] = "absent" if engine.rank() else "host"
    if cache is None:
        backbone = generator.load(recipe, device, **instead)
        if ":" in recipe.model.backbone:
            _check_own(backbone, recipe, prompts)
        return backbone, partial(encode, backbone, size)
    fill(cache, prompts, lambda: generator.load(recipe, device, text_encoders="only"), size)
    rest = generator.load(recipe, device, text_encoders="absent", **instead)
    return rest, partial(cache.read, device=device)


def _check_own(backbone: Backbone, recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    if checks := getattr(backbone, "check", None):
        checks(prompts)
    shape, shown = generator.shapes(recipe, backbone)
    if recipe.eval_size != recipe.model.size and shape == shown:
        raise ValueError(
            f"eval.resolution and eval.num_frames: samples of backbone '{recipe.model.backbone}' "
            f"are {shape} whatever the size; use null"
        )


def fingerprint(folder: Path, memory: Path | None = None, parts: tuple[str, ...] = READ) -> str:
    """Hash of a pipeline folder's index and of the files of its parts that begin with `parts`.

    All bytes count; `memory` is a folder where the hashes of files are kept for the next start.
    """
    paths = [
        folder / "model_index.json",
        *(f for name in parts for f in sorted(folder.glob(f"{name}*/**/*"))),
    ]
    present = [path for path in paths if path.is_file()]
    return hashes.of_files(folder, present, memory=memory, quiet=engine.rank() != 0)


def fill(
    cache: Cache, prompts: Sequence[Prompt], load: Callable[[], Any], size: tuple[int, int, int]
) -> None:
    """Embed the prompts that are missing, ranks sharing the work; `load` loads text encoders.

    They are loaded only if some rank misses a prompt, and freed at the end.
    """
    missing = cache.missing(prompts)
    if not engine.largest(len(missing)):
        return
    encoder = load()
    # All ranks have looked before any of them writes; what another rank wrote to a disk of its
    # own is missing here still, and embedded in the second round.
    for names in (missing[engine.rank() :: engine.world()], missing):
        left = [prompt for prompt in names if not cache.path(prompt).is_file()]
        _embed(cache, left, partial(encode, encoder, size))
        engine.barrier()
    del encoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _embed(cache: Cache, prompts: Sequence[Prompt], embed: Embed) -> None:
    quiet = engine.rank() != 0 or not prompts
    with tqdm(total=len(prompts), desc="embedding prompts", unit="prompt", disable=quiet) as bar:
        for rows in batches(len(prompts), WRITTEN):
            part = prompts[rows]
            cache.write(part, embed(part))
            bar.update(len(part))
