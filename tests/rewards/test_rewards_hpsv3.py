"""HPSv3 beside the scores of its published code, on the same weights, images and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from sfgrpo import rewards
from sfgrpo.rewards import _qwen2_vl, hpsv3
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise
from tests.support import qwen2_vl
from tests.support.clip import pictures, to_bytes
from tests.support.filled import Shapes, filled
from tests.support.qwen2_vl import both

PROMPTS = ["a red seven", "nine", "a red nine a red nine"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = ["[PAD]", "[UNK]", *SPECIAL, "a", "red", "seven", "nine", "image", "is", "the", "user"]


def shapes() -> Shapes:
    """Of the published file, at these sizes."""
    return {
        **qwen2_vl.shapes(len(WORDS) + 1), **both("rm_head.0", 1024, qwen2_vl.WIDTH),
        **both("rm_head.3", 16, 1024), **both("rm_head.5", 2, 16),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3")
    qwen2_vl.config(image_token_id=WORDS.index("<|image_pad|>")).save_pretrained(path)
    qwen2_vl.tokenizer(WORDS, SPECIAL).save_pretrained(path)
    save_file(filled(shapes()), path / "it.safetensors")
    return path


def build(folder: Path, **options: Any) -> hpsv3.Hpsv3:
    given: dict[str, Any] = {"model": str(folder / "it.safetensors"), "base": str(folder)}
    given |= {"device": "cpu", "dtype": "fp32", **options}
    return hpsv3.build(**given)


@pytest.mark.parametrize(
    ("height", "width", "expected", "rounding"),
    [
        (448, 448, [-0.1680332, -0.2428623, -0.2621905], 1e-5),
        (96, 96, [-0.1682661, -0.2424592, -0.2621664], 1e-3),
        (120, 300, [-0.1622491, -0.2346065, -0.2586310], 1e-3),
    ],
)
def test_scores_are_the_published_code_s(
    folder: Path, height: int, width: int, expected: list[float], rounding: float
) -> None:
    """Those of `Qwen2VLRewardModelBT` of hpsv3 1.0.0 with transformers 4.45.2, its processor and
    Pillow, which rounds to eight bits where it resizes, for `filled(shapes())`."""
    images = pictures(3, height, width)
    scores = build(folder)(images, PROMPTS, [{}] * 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=rounding, rtol=0)


def test_patches_are_transformers(folder: Path) -> None:
    images = pictures(2, 56, 84)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 84, max_pixels=56 * 84)
    shown = [to_bytes(image) for image in images]
    expected: Any = processor(images=shown, return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    still = normalise(images, CLIP_MEAN, CLIP_STD)[:, None].expand(-1, 2, -1, -1, -1)
    ours = _qwen2_vl.patches(still, patch=14, merge=2, frames=2)
    torch.testing.assert_close(ours, torch.as_tensor(expected["pixel_values"]))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((96, 96), (448, 448)),
        ((120, 300), (308, 728)),
        ((720, 1280), (336, 588)),
    ],
)
def test_sizes_are_the_published_code_s(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Of `smart_resize(*size, min_pixels=200704, max_pixels=200704)` of hpsv3 1.0.0."""
    bounds = {"least": hpsv3.PIXELS, "most": hpsv3.PIXELS}
    assert _qwen2_vl.fitted(*size, factor=28, **bounds) == expected


def test_batches_and_precisions_agree(folder: Path) -> None:
    images = pictures(3, 64, 64)
    options = {"model": str(folder / "it.safetensors"), "base": str(folder), "dtype": "fp32"}
    mixture = rewards.load({"hpsv3": 1}, {"hpsv3": options | {"batch": 2}})
    total, _ = mixture(images.requires_grad_(), PROMPTS, [{}] * 3)
    assert not total.requires_grad
    torch.testing.assert_close(total, build(folder)(images, PROMPTS, [{}] * 3))
    half = build(folder, dtype="bf16")(images, PROMPTS, [{}] * 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, total, atol=0.02, rtol=0)
    assert build(folder)(torch.empty(0, 3, 8, 8), [], []).shape == (0,)


def test_what_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the prompt has <\|Reward\|> in it: 'a <\|Reward\|>'"):
        build(folder)(pictures(1), ["a <|Reward|>"], [{}])

    def refused(changes: dict[str, Tensor], without: str = "") -> str:
        state = {n: v for n, v in {**filled(shapes()), **changes}.items() if n != without}
        save_file(state, tmp_path / "it.safetensors")
        with pytest.raises(ValueError, match=r"reward 'hpsv3': '.*it\.safetensors'") as caught:
            build(folder, model=str(tmp_path / "it.safetensors"))
        return str(caught.value)

    assert "'visual.more' belongs to nothing" in refused({"visual.more": torch.ones(1)})
    assert "is no Qwen2-VL" in refused({}, "model.embed_tokens.weight")
    assert "'4.bias' should be of shape (2,), is None" in refused({}, "rm_head.5.bias")
