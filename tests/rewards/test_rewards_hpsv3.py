"""HPSv3 beside the scores of its published code, on the same weights, images and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessorPil

from sfgrpo import rewards
from sfgrpo.rewards import _qwen2_vl, hpsv3
from sfgrpo.rewards._pixels import CLIP_MEAN, CLIP_STD, normalise
from tests.support.clip import pictures, to_bytes
from tests.support.filled import Shapes, filled

PROMPTS = ["a red seven", "nine", "a red nine a red nine"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = ["[PAD]", "[UNK]", *SPECIAL, "a", "red", "seven", "nine", "image", "is", "the", "user"]
WIDTH, LAYERS = 32, 2


def both(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes() -> Shapes:
    """Of the published file, at these sizes."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(WORDS) + 1, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (len(WORDS) + 1, WIDTH),
        "visual.patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14),
        **both("visual.merger.ln_q", WIDTH),
        **both("visual.merger.mlp.0", 4 * WIDTH, 4 * WIDTH),
        **both("visual.merger.mlp.2", WIDTH, 4 * WIDTH),
        **both("rm_head.0", 1024, WIDTH), **both("rm_head.3", 16, 1024), **both("rm_head.5", 2, 16),
    }  # fmt: skip
    for layer in range(LAYERS):
        eye, text = f"visual.blocks.{layer}", f"model.layers.{layer}"
        found |= {
            **both(f"{eye}.norm1", WIDTH), **both(f"{eye}.norm2", WIDTH),
            **both(f"{eye}.attn.qkv", 3 * WIDTH, WIDTH), **both(f"{eye}.attn.proj", WIDTH, WIDTH),
            **both(f"{eye}.mlp.fc1", 2 * WIDTH, WIDTH), **both(f"{eye}.mlp.fc2", WIDTH, 2 * WIDTH),
            **both(f"{text}.self_attn.q_proj", WIDTH, WIDTH),
            **both(f"{text}.self_attn.k_proj", WIDTH // 2, WIDTH),
            **both(f"{text}.self_attn.v_proj", WIDTH // 2, WIDTH),
            f"{text}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{text}.mlp.gate_proj.weight": (48, WIDTH),
            f"{text}.mlp.up_proj.weight": (48, WIDTH),
            f"{text}.mlp.down_proj.weight": (WIDTH, 48),
            f"{text}.input_layernorm.weight": (WIDTH,),
            f"{text}.post_attention_layernorm.weight": (WIDTH,),
        }  # fmt: skip
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", extra_special_tokens=SPECIAL
    )


def config() -> Qwen2VLConfig:
    text: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 99, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]
        },
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2
    }  # fmt: skip
    image = WORDS.index("<|image_pad|>")
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3")
    config().save_pretrained(path)
    tokenizer().save_pretrained(path)
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
