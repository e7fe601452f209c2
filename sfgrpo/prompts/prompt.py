"""A prompt, the prompts of a run, and the hash by which a run knows its own again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sfgrpo.prompts import images


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its rewards need to know (target text, colours, ...)."""

    text: str
    metadata: dict[str, Any]
    where: str = field(default="", compare=False)
    """File and line (or row) that it was read from, for messages; no part of what it is."""
    images: tuple[str, ...] = field(default=(), compare=False)
    """Those of the metadata that the generator gets, see `sfgrpo.prompts.images`."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a run trains on and what its evaluation shows."""

    train: list[Prompt]
    evaluation: list[Prompt]
    """The same list as `train` if nothing is set apart for evaluation."""

    @property
    def all(self) -> list[Prompt]:
        """Every prompt of the run: those of evaluation follow if they are not the same."""
        return self.train if self.evaluation is self.train else [*self.train, *self.evaluation]


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of texts and metadata in their order, whatever file they were read from; of the
    images that generators get it is what they hold that counts."""
    found = hashlib.sha256()
    for prompt in prompts:  # repr: a column of a table may hold what JSON does not know
        metadata = dict(prompt.metadata)
        if prompt.images:
            metadata[images.KEY] = [images.content(source) for source in prompt.images]
        entry = json.dumps([prompt.text, metadata], sort_keys=True, default=repr)
        found.update(f"{entry}\n".encode())
    return found.hexdigest()


def fingerprint(split: Split) -> str:
    """SHA-256 (hex) of the prompts of both sides.

    Two splits with the same fingerprint give a run the same prompts: numbers of prompts, which are
    what an iteration draws and pictures are kept by, mean the same.
    """
    sides = f"{digest(split.train)} {digest(split.evaluation)}"
    return hashlib.sha256(sides.encode()).hexdigest()
