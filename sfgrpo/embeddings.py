"""Prompts -> conditioning: embedded whenever asked for, or once for all and kept on disk.

With `model.prompt_cache` every prompt of a run is embedded before the network is loaded, so that
memory never holds text encoders and network together, and a run that finds all its prompts there
loads no text encoder at all.

A file holds one prompt's embedding without its padding, under a key of everything that decides it:
the text encoders' and tokenizers' files (see `sfgrpo.hashes`), the pipeline's class, length, dtype
and the libraries' versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sfgrpo import backbones, engine, files, generator, hashes
from sfgrpo.backbones.base import Conditioning
from sfgrpo.config import Recipe
from sfgrpo.prompts import Split
from sfgrpo.rollout import batches

WRITTEN = 16
"""Prompts between two steps of the progress bar; what is written survives an interruption."""
Embed = Callable[[Sequence[str]], Conditioning]


class Cache:
    """Embeddings of prompts on disk, one safetensors file each."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key` names the model; prompts of different models lie in different folders."""
        self.folder = folder / key[:32]

    def path(self, prompt: str) -> Path:
        """Where a prompt's embedding lies, if it does."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are not there, each once, in their order."""
        return [p for p in dict.fromkeys(prompts) if not self.path(p).is_file()]

    def read(self, prompts: Sequence[str], *, device: torch.device) -> Conditioning:
        """The conditioning of prompts that are there.

        Raises:
            ValueError: names a file that is damaged.
        """
        return Conditioning.cat([self._read(self.path(prompt)) for prompt in prompts]).to(device)

    def _read(self, path: Path) -> Conditioning:
        try:
            parts = load_file(path)
            return Conditioning(tokens=parts["tokens"], pooled=parts.get("pooled"))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"prompt cache: '{path}' is damaged ({error}); delete it, and it is made anew"
            ) from error

    def write(self, prompts: Sequence[str], found: Conditioning) -> None:
        """Keep the conditioning of `prompts`; a file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, (prompt, tokens) in enumerate(zip(prompts, found.unpadded(), strict=True)):
            parts: dict[str, Tensor] = {"tokens": tokens[None]}
            if found.pooled is not None:
                parts["pooled"] = found.pooled[row : row + 1]
            with files.replacing(self.path(prompt)) as aside:
                save_file({name: part.cpu().contiguous() for name, part in parts.items()}, aside)


def open_cache(recipe: Recipe) -> Cache | None:
    """The cache that a recipe asks for, if it does."""
    model = recipe.model
    if model.prompt_cache is None:
        return None
    described = {
        "files": fingerprint(backbones.folder(model.path), model.prompt_cache / "hashes"),
        "backbone": model.backbone,
        "length": model.max_sequence_length,
        "dtype": model.dtype,
        "libraries": [version("diffusers"), version("transformers")],
    }
    text = json.dumps(described, sort_keys=True)
    return Cache(model.prompt_cache, hashlib.sha256(text.encode()).hexdigest())


def backbone_of(
    recipe: Recipe, device: torch.device, found: Split
) -> tuple[backbones.Backbone, Embed]:
    """The recipe's backbone, and what embeds its prompts; with a cache, all `found` are in it.

    Raises:
        OSError: says where a folder or Hub id was looked for.
        ValueError: options that the model or the device cannot serve, naming the key.
    """
    cache = open_cache(recipe)
    if cache is None:
        backbone = generator.load(recipe, device)
        return backbone, backbone.encode
    prompts = [p.text for p in found.all]
    prompts += [recipe.sample.negative_prompt] if recipe.sample.guidance_scale != 1 else []
    fill(cache, prompts, lambda: generator.load(recipe, device, text_encoders="only"))
    rest = generator.load(recipe, device, text_encoders="absent")
    return rest, partial(cache.read, device=device)


def fingerprint(folder: Path, memory: Path | None = None) -> str:
    """Hash of the text encoders' and tokenizers' files of a pipeline folder, and its index.

    All bytes count; `memory` is a folder where the hashes of files are kept for the next start.
    """
    paths = [
        folder / "model_index.json",
        *(
            f
            for name in ("text_encoder*", "tokenizer*")
            for f in sorted(folder.glob(f"{name}/**/*"))
        ),
    ]
    present = [path for path in paths if path.is_file()]
    return hashes.of_files(folder, present, memory=memory, quiet=engine.rank() != 0)


def fill(cache: Cache, prompts: Sequence[str], load: Callable[[], Any]) -> None:
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
        _embed(cache, [p for p in names if not cache.path(p).is_file()], encoder.encode)
        engine.barrier()
    del encoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _embed(cache: Cache, prompts: Sequence[str], encode: Embed) -> None:
    quiet = engine.rank() != 0 or not prompts
    with tqdm(total=len(prompts), desc="embedding prompts", unit="prompt", disable=quiet) as bar:
        for rows in batches(len(prompts), WRITTEN):
            part = prompts[rows]
            cache.write(part, encode(part))
            bar.update(len(part))
