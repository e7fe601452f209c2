"""Images on their way to a Qwen2-VL, without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from sfgrpo.backbones import _processors
from sfgrpo.processors import OF_IMAGES
from sfgrpo.prompts import images
from tests.support.families.parts import byte_tokenizer, picture

IMAGE = "<|image_pad|>"


@pytest.fixture
def processor(tmp_path: Path) -> Any:
    """As read from a folder in the layout of published ones, which transformers 4 wrote."""
    tokenizer = byte_tokenizer(f"{IMAGE} <|video_pad|>")
    reader = Qwen2VLImageProcessorPil(max_pixels=112 * 112)
    made = OF_IMAGES["Qwen2VLProcessor"](reader, tokenizer)
    made.save_pretrained(tmp_path / "processor")
    (tmp_path / "processor" / "processor_config.json").unlink()
    told = {**reader.to_dict(), "image_processor_type": "Qwen2VLImageProcessorFast"}
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps(told))
    index = {"_class_name": "APipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    options = {"variant": "fp16", "revision": "main"}
    assert not _processors.ready(tmp_path, index, {**options, "processor": made})
    return _processors.ready(tmp_path, index, options)["processor"]


def by_torchvision(image: Image.Image, height: int, width: int) -> Tensor:
    """Patches as transformers' torchvision backend makes them: 8 bits are resized to 8 bits, by the
    operation of PyTorch that torchvision calls."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].float()
    mean, std = (
        255 * torch.tensor(values).view(3, 1, 1)
        for values in (Qwen2VLImageProcessorPil.image_mean, Qwen2VLImageProcessorPil.image_std)
    )
    order = "c (gh mh ph) (gw mw pw) -> (gh gw mh mw) (c t ph pw)"
    return repeat((resized - mean) / std, order, mh=2, mw=2, ph=14, pw=14, t=2)


@pytest.mark.parametrize(
    ("size", "sides", "levels"),
    [((84, 56), (56, 84), 0), ((100, 70), (56, 112), 2), ((600, 300), (56, 140), 2)],
    ids=["as it is", "resized", "smaller"],
)
def test_images_are_prepared_as_by_torchvision(
    processor: Any, size: tuple[int, int], sides: tuple[int, int], levels: int
) -> None:
    image = images.opened(picture(1, size))
    given = processor(text=[f"a {IMAGE} b"], images=[image], return_tensors="pt")
    height, width = sides
    assert given["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    level = 1 / 255 / min(Qwen2VLImageProcessorPil.image_std)
    found, expected = given["pixel_values"], by_torchvision(image, height, width)
    torch.testing.assert_close(found, expected, rtol=0, atol=levels * level + 1e-6)
    assert ((found - expected).abs() > 1e-6).float().mean() < 0.01
    place = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (given["input_ids"] == place).sum() == height // 28 * (width // 28)
