"""The images that prompts bring (`sfgrpo.prompts.images`), for rewards that see them, too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from sfgrpo.prompts import images
from sfgrpo.rewards.base import Metadata


def named(entry: Metadata, folder: Path = Path()) -> list[str]:
    """What `metadata["image"]` names, one or more, as `images.opened` takes it; KeyError if it
    names none. `folder` is what relative paths start from."""
    given = entry.get(images.KEY)
    found = [given] if isinstance(given, str) else given
    if not found or not isinstance(found, list):
        raise KeyError(f"no metadata '{images.KEY}', the file that the image was made from")
    return [images.located(source, folder) for source in found]


def check(metadata: Sequence[Metadata], folder: Path = Path()) -> None:
    """KeyError for metadata that name no image, FileNotFoundError for one that is not there."""
    for entry in metadata:
        for source in named(entry, folder):
            if not source.startswith(images.INLINE) and not Path(source).is_file():
                raise FileNotFoundError(f"metadata '{images.KEY}': there is no file '{source}'")


def beside(entry: Metadata, shape: Sequence[int]) -> list[Image.Image]:
    """The images of a prompt, none larger than one `[..., H, W]` that is shown beside them."""
    side = max(shape[-2:])
    return [_shown(source, side) for source in named(entry)]


@lru_cache(maxsize=64)
def _shown(source: str, side: int) -> Image.Image:
    """Kept, for a group asks for the same one as often as it has images and states."""
    found = images.opened(source)
    found.thumbnail((side, side), Image.Resampling.BICUBIC)
    return found
