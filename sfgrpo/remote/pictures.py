"""Images as PNG or JPEG, and back.

Eight bits a channel: a reward sees rounded pixels (and JPEG's losses), where a tensor is sent as it
is. A file from elsewhere may be small and its image huge, so its size is looked at before a pixel
is decoded.
"""

from __future__ import annotations

import base64
import io
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from sfgrpo.names import in_one_line

Kind = Literal["png", "jpeg"]
KINDS = ("PNG", "JPEG")
QUALITY = 95
"""Of JPEG: what is lost is below what eight bits lose, mostly."""


class TooLarge(ValueError):
    """More pixels than are allowed."""


def encode(image: Tensor, kind: Kind) -> str:
    """Base64 of the file of an image `[3, H, W]` in [0, 1], on any device."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return pack(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), mode="RGB"), kind)


def pack(picture: Image.Image, kind: Kind) -> str:
    """Base64 of the file of a picture in RGB."""
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG", compress_level=1)
    else:
        picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode(text: str, *, pixels: int) -> Tensor:
    """The image `[3, H, W]` uint8 of a base64 PNG or JPEG; of several frames, the first.

    Raises:
        TooLarge: it has more than so many `pixels`; nothing was decoded.
        ValueError: it is neither, or damaged.
    """
    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
    except ValueError:
        raise ValueError("an image is not base64") from None
    try:
        with Image.open(file, formats=KINDS) as picture:
            width, height = picture.size
            if width * height > pixels:
                raise TooLarge(f"an image of {width} x {height} has more than {pixels} pixels")
            found = picture.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"an image has more than {pixels} pixels ({error})") from None
    except TooLarge:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        said = in_one_line(error)[:100]
        raise ValueError(f"an image is neither PNG nor JPEG, or damaged ({said})") from None
    data = torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1)
