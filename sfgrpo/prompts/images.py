"""Images that prompts bring: what is to be edited, or where a video starts.

They stand in the metadata under "image": one or a list, each a path (relative to the file that the
prompt is read from) or, from a dataset that holds the bytes, a URL "data:image/png;base64,...".
Rewards and judges find there what `opened` opens.
"""

from __future__ import annotations

import base64
import hashlib
import io
import reprlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from sfgrpo.names import in_one_line

if TYPE_CHECKING:  # whose hash asks for what images hold
    from sfgrpo.prompts.prompt import Prompt

KEY = "image"
"""Of the metadata."""
NONE = range(1)
"""How many images a prompt may bring to a model that takes none."""
INLINE = "data:"
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF entry of how a camera was held, and its values where width and height swap."""
STARTS = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"RIFF": "image/webp"}
"""How files begin."""


def attached(found: Iterable[Prompt], folder: Path, counts: range) -> list[Prompt]:
    """Prompts with the images that their metadata name, each read once to see that it can be.

    Args:
        folder: what relative paths start from.
        counts: how many images a prompt may bring.

    Raises:
        ValueError: names the prompt's row: no image or too many, one that is missing or damaged.
    """
    return [_with_images(prompt, folder, counts) for prompt in found]


def _with_images(prompt: Prompt, folder: Path, counts: range) -> Prompt:
    value = prompt.metadata.get(KEY)
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        told = reprlib.repr(value)
        raise ValueError(f"{prompt.where}: '{KEY}' must be a path or a list of paths, got {told}")
    if len(given) not in counts:
        raise ValueError(
            f"{prompt.where}: this backbone takes {_told(counts)} with a prompt, under '{KEY}', "
            f"got {len(given) or 'none'}"
        )
    sources = [located(item, folder) for item in given]
    for source in sources:
        try:
            size(source)
        except FileNotFoundError:
            raise ValueError(f"{prompt.where}: there is no image '{source}'") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            told = in_one_line(error) or type(error).__name__
            shown = f"{source[:80]}..." if source.startswith(INLINE) else source
            raise ValueError(
                f"{prompt.where}: image '{shown}' cannot be read ({told[:200]})"
            ) from None
    told_as = sources if isinstance(value, list) else sources[0] if sources else None
    metadata = prompt.metadata if value is None else {**prompt.metadata, KEY: told_as}
    return replace(prompt, metadata=metadata, images=tuple(sources))


def located(source: str, folder: Path) -> str:
    """The source with `folder` before a relative path."""
    return source if source.startswith(INLINE) else str(folder / source)


def _told(counts: range) -> str:
    least, most = counts[0], counts[-1]
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} image{'s' if most > 1 else ''}"


def inline(value: Any) -> Any:
    """What `datasets` has of an image that it does not decode, or of a list of them, as a path or
    a URL with the bytes."""
    if isinstance(value, list):
        return [inline(item) for item in value]
    if not isinstance(value, dict):
        return value
    data = value["bytes"]
    if data is None:
        return value["path"]
    kind = next((kind for start, kind in STARTS.items() if data.startswith(start)), "image/*")
    return f"{INLINE}{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _read(source: str) -> bytes:
    if not source.startswith(INLINE):
        return Path(source).read_bytes()
    return base64.b64decode(source.partition(",")[2], validate=True)


def opened(source: str) -> Image.Image:
    """The image as diffusers' `load_image` opens it: upright, RGB.

    Raises:
        OSError: there is no such file, or it holds no image.
    """
    with Image.open(io.BytesIO(_read(source))) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


@cache
def size(source: str) -> tuple[int, int]:
    """(width, height) of the image as `opened` opens it; reads all of the file, once in a process.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: Pillow's, of what it cannot
            read.
    """
    with Image.open(io.BytesIO(_read(source))) as file:
        width, height = file.size
        file.draft("RGB", (1, 1))  # JPEGs are read whole, and computed at an eighth of their size
        file.load()
        is_turned = file.getexif().get(ORIENTATION) in TURNED
    return (height, width) if is_turned else (width, height)


@cache
def content(source: str) -> str:
    """SHA-256 (hex) of the file, as it was when a process asked first."""
    return hashlib.sha256(_read(source)).hexdigest()
