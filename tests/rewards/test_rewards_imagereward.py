"""ImageReward beside the scores of its published code, on the same weights, images and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from sfgrpo import rewards
from sfgrpo.rewards import imagereward
from tests.support.clip import pictures
from tests.support.filled import Shapes, filled

PROMPTS = ["a red seven", "a white one on a black background", "nine"]
SIDE, PATCH, WIDTH, LAYERS = 32, 8, 128, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(PROMPTS).split(), "x", "##x"]
VOCABULARY = {word: place for place, word in enumerate(dict.fromkeys(WORDS))}


def both(name: str, *shape: int) -> Shapes:
    """A linear layer or norm of this weight."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def shapes() -> Shapes:
    """Of the published ImageReward, at these sizes."""
    found: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, WIDTH),
        "blip.visual_encoder.pos_embed": (1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        **both("blip.visual_encoder.patch_embed.proj", WIDTH, 3, PATCH, PATCH),
        **both("blip.visual_encoder.norm", WIDTH),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, WIDTH),
        **both("blip.text_encoder.embeddings.LayerNorm", WIDTH),
        **both("blip.vision_proj", 16, WIDTH),
        **both("blip.text_proj", 16, WIDTH),
    }
    for layer in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{layer}"
        found |= {
            **both(f"{block}.norm1", WIDTH), **both(f"{block}.norm2", WIDTH),
            **both(f"{block}.attn.qkv", 3 * WIDTH, WIDTH),
            **both(f"{block}.attn.proj", WIDTH, WIDTH),
            **both(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH),
            **both(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH),
        }  # fmt: skip
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for kind in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                found |= both(f"{block}.{kind}.{part}", WIDTH, WIDTH)
            found |= both(f"{block}.{kind}.output.LayerNorm", WIDTH)
        found |= {
            **both(f"{block}.intermediate.dense", 2 * WIDTH, WIDTH),
            **both(f"{block}.output.dense", WIDTH, 2 * WIDTH),
            **both(f"{block}.output.LayerNorm", WIDTH),
        }
    sizes = {0: (1024, WIDTH), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for place, shape in sizes.items():
        found |= both(f"mlp.layers.{place}", *shape)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save({**filled(shapes()), **positions}, path / "it.pt")
    tokenizer(path)
    return path


def tokenizer(path: Path) -> None:
    BertTokenizer(vocab=VOCABULARY).save_pretrained(path)


def build(folder: Path, **options: Any) -> imagereward.ImageReward:
    return imagereward.build(
        model=str(folder / "it.pt"), tokenizer=str(folder), device="cpu", **options
    )


@pytest.mark.parametrize(
    ("height", "width", "expected", "rounding"),
    [
        (32, 32, [0.1634183, -0.0451983, -0.0190631], 1e-5),
        (64, 64, [0.1647166, -0.0436449, -0.0263846], 5e-3),
        (48, 90, [0.4994986, -0.1242758, 0.0871689], 5e-3),
        (91, 33, [0.3719381, -0.1619888, 0.0977651], 5e-3),
    ],
)
def test_scores_are_the_published_code_s(
    folder: Path, height: int, width: int, expected: list[float], rounding: float
) -> None:
    """Those of `ImageReward.score` of image-reward 1.5 (towers of two layers), with Pillow and
    torchvision 0.28, for `filled(shapes())`. Pillow rounds to eight bits where it resizes."""
    images = pictures(3, height, width)
    scores = build(folder)(images, PROMPTS, [{}] * 3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=rounding, rtol=0)


def test_batches_and_precisions_agree(folder: Path) -> None:
    images = pictures(3, 40, 40)
    scores = build(folder)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(build(folder, batch=2)(images, PROMPTS, [{}] * 3), scores)
    half = build(folder, dtype="bf16")(images, PROMPTS, [{}] * 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=0.05, rtol=0)
    options = {"model": str(folder / "it.pt"), "tokenizer": str(folder)}
    total, _ = rewards.load({"imagereward": 1}, {"imagereward": options})(
        images.requires_grad_(), PROMPTS, [{}] * 3
    )
    torch.testing.assert_close(total, scores)
    assert not total.requires_grad
    assert build(folder)(torch.empty(0, 3, 8, 8), [], []).shape == (0,)


def test_long_prompts_are_cut_and_told(folder: Path) -> None:
    reward = build(folder)
    long = " ".join(["red"] * 33)
    reward.check([long, "red"], [{}] * 2)
    with pytest.warns(UserWarning, match="reward 'imagereward': 1 of 2 prompts are longer"):
        reward.check([f"{long} seven", "red"], [{}] * 2)
    images = pictures(1).repeat(2, 1, 1, 1)
    scores = reward(images, [f"{long} seven", f"{long} nine"], [{}] * 2)
    assert scores[0] == scores[1]


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    def refused(changes: dict[str, Tensor], without: str = "") -> str:
        given = {n: v for n, v in {**filled(shapes()), **changes}.items() if n != without}
        torch.save(given, tmp_path / "it.pt")
        with pytest.raises(ValueError, match=r"reward 'imagereward': '.*it\.pt'") as caught:
            imagereward.build(model=str(tmp_path / "it.pt"), tokenizer=str(folder))
        return str(caught.value)

    one = torch.ones(1)
    assert "'vqa.x' is not a name of ImageReward's" in refused({"vqa.x": one})
    assert "'blocks.0.more.weight' is not a name of ImageReward's image" in refused(
        {"blip.visual_encoder.blocks.0.more.weight": one}
    )
    assert "'post_layernorm.bias' is missing" in refused({}, "blip.visual_encoder.norm.bias")
    assert "embeddings.word_embeddings.weight" in refused(
        {}, "blip.text_encoder.embeddings.word_embeddings.weight"
    )
    assert "'7.bias' should be of shape (1,), is None" in refused({}, "mlp.layers.7.bias")
