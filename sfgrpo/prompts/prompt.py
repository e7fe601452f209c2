"""A prompt, and the prompts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its rewards need to know (target text, colours, ...)."""

    text: str
    metadata: dict[str, Any]
    where: str = field(default="", compare=False)
    """File and line (or row) that it was read from, for messages; no part of what it is."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a run trains on and what its evaluation shows."""

    train: list[Prompt]
    evaluation: list[Prompt]
    """The same list as `train` if nothing is set apart for evaluation."""
