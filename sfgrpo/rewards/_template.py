"""Questions that show a prompt, or what else its line of the prompt file says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sfgrpo.rewards.base import Metadata

PLACE = re.compile(r"\{(prompt|metadata\.[\w-]+)\}")
"""What is replaced in a template; other braces, as of JSON, stay."""
EDITED = 'The last image was made from the image before it, as told: "{prompt}". '
"""How questions about edits begin."""


def filled(template: str, prompt: str, metadata: Metadata) -> str:
    """The template with its places filled; KeyError for metadata that lack a key."""

    def value(place: re.Match[str]) -> str:
        if place[1] == "prompt":
            return prompt
        key = place[1].removeprefix("metadata.")
        if key not in metadata:
            raise KeyError(f"prompt {prompt!r} has no metadata {key!r}, which the template shows")
        return str(metadata[key])

    return PLACE.sub(value, template)


def check(template: str, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """KeyError for metadata that lack what the template shows."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        filled(template, prompt, entry)
