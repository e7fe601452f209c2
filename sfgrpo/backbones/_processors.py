"""Parts of pipelines that transformers reads beside torchvision alone, of which the pipelines here
use what does not need it.

Qwen2-VL's processor prepares a prompt and its images for the text encoder; it is read without its
part for videos (`sfgrpo.processors`). FLUX.2-dev's processor is asked for texts alone, which it
hands to its tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TokenizersBackend

from sfgrpo.processors import OF_IMAGES

READ_AS: Mapping[str, Any] = {**OF_IMAGES, "PixtralProcessor": TokenizersBackend}
"""What is read, by the name of the class that a pipeline's folder names."""
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options of a pipeline's `from_pretrained` that say where its files come from."""


def ready(path: str | Path, index: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline's folder or Hub id that are read here, by name.

    Args:
        index: what its model_index.json says.
        options: those of the pipeline's `from_pretrained`, parts among them.

    Raises:
        OSError: says where a part was looked for.
    """
    hub = {name: options[name] for name in HUB if name in options}
    return {
        name: READ_AS[entry[1]].from_pretrained(path, subfolder=name, **hub)
        for name, entry in index.items()
        if isinstance(entry, (list, tuple)) and entry[1] in READ_AS and name not in options
    }
