"""Processors of Qwen's vision-language models, read without their parts for videos.

Those need torchvision. What prepares the images is transformers' own choice: its torchvision
backend where torchvision is installed, else its Pillow backend, of the same sizes, bicubic filter
and normalisation. An image that is resized has fewer than one value in a hundred that differ, by a
level or two of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    PROCESSOR_MAPPING,
    AutoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)


def _of_images(kind: Any) -> Any:
    """The class `kind` of an image processor and a tokenizer alone.

    transformers reads from the signature of `__init__` of which parts a processor consists.
    """

    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": __name__})


OF_IMAGES: Mapping[str, Any] = {
    kind.__name__: _of_images(kind)
    for kind in (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor)
}
"""Processors that take no videos, by the name of the class that a folder names."""


def read(path: str, config: Any) -> Any:
    """What `AutoProcessor` reads of a folder or Hub id, without its part for videos where its class
    is one of `OF_IMAGES`.

    Args:
        config: of the model that the processor is for.

    Raises:
        OSError: says where a part was looked for.
    """
    kind = PROCESSOR_MAPPING.get(type(config), None)
    name = getattr(kind, "__name__", "")
    return OF_IMAGES.get(name, AutoProcessor).from_pretrained(path)
