"""A tiny pipeline of every family: real classes, random weights, tokenizers built here.

Each builder returns a pipeline as `from_pretrained` would; `save` writes it as a folder. Weights
are normal, none of them zero, so that no part of a network hides behind a zero projection. A family
is added by an entry in the FAMILIES of one of these modules.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.families import edits, images, instructed, qwen3, several, sound, videos
from tests.support.families.parts import NEGATIVE, PROMPTS, Family, diffusers, scheduler

__all__ = [
    "FAMILIES",
    "NEGATIVE",
    "PROMPTS",
    "Family",
    "diffusers",
    "edits",
    "images",
    "instructed",
    "qwen3",
    "save",
    "scheduler",
    "several",
    "sound",
    "videos",
]

FAMILIES: dict[str, Family] = (
    images.FAMILIES
    | qwen3.FAMILIES
    | several.FAMILIES
    | instructed.FAMILIES
    | videos.FAMILIES
    | sound.FAMILIES
    | edits.FAMILIES
)


def save(name: str, folder: Path) -> Path:
    """Build a family's pipeline and write it as a folder."""
    FAMILIES[name].build().save_pretrained(folder)
    return folder
