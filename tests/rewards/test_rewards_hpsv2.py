"""HPSv2 beside the scores of its published code, on the same weights, images and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfgrpo.embedded import architecture
from sfgrpo.rewards import _open_clip, hpsv2
from sfgrpo.rewards._clip import CosineReward
from tests.support.clip import pictures
from tests.support.filled import Shapes, filled

PROMPTS = ["a red seven", "a white one on a black background", "nine"]
SIDE, PATCH, JOINT, IMAGE, TEXT, LENGTH = 32, 8, 64, 160, 128, 12
LAYERS = 2
KINDS = ("weight", "bias")


def layers(tower: str, width: int) -> Shapes:
    parts = {
        "ln_1.weight": (width,), "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,), "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    return {f"{tower}.{n}.{part}": shape for n in range(LAYERS) for part, shape in parts.items()}


def shapes(vocabulary: int) -> Shapes:
    """Of open_clip's CLIP, as hpsv2 has it."""
    return {
        "positional_embedding": (LENGTH, TEXT),
        "text_projection": (TEXT, JOINT),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, TEXT),
        "ln_final.weight": (TEXT,),
        "ln_final.bias": (TEXT,),
        "visual.class_embedding": (IMAGE,),
        "visual.positional_embedding": (1 + (SIDE // PATCH) ** 2, IMAGE),
        "visual.proj": (IMAGE, JOINT),
        "visual.conv1.weight": (IMAGE, 3, PATCH, PATCH),
        **{f"visual.ln_{n}.{kind}": (IMAGE,) for n in ("pre", "post") for kind in KINDS},
        **layers("transformer.resblocks", TEXT),
        **layers("visual.transformer.resblocks", IMAGE),
    }


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return filled(shapes(len(architecture.build_tokenizer())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "state_dict": state}, path / "hps.pt")
    architecture.build_tokenizer().save_pretrained(path)
    return path


def build(folder: Path, **options: Any) -> CosineReward:
    return hpsv2.build(model=str(folder / "hps.pt"), processor=str(folder), device="cpu", **options)


@pytest.mark.parametrize(
    ("height", "width", "antialias", "expected"),
    [
        (32, 32, True, [0.14148408, -0.12348798, 0.14401604]),
        (48, 90, True, [0.11481540, -0.00445087, 0.11126516]),
        (48, 90, False, [0.11459436, -0.00143936, 0.11195377]),
        (91, 33, True, [0.09321439, 0.15200725, 0.07451424]),
        (20, 17, True, [0.12747310, -0.03495399, 0.14339004]),
    ],
)
def test_scores_are_the_published_code_s(
    folder: Path, height: int, width: int, antialias: bool, expected: list[float]
) -> None:
    """Those of hpsv2 1.2.0's CLIP and `image_transform(32, False, resize_longest_max=True)`, with
    torchvision 0.28, for `filled(shapes(V))`; tokens by the same tokeniser, padded with zeros."""
    images = pictures(3, height, width)
    scores = build(folder, antialias=antialias)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-6, rtol=0)


def test_batches_and_precisions_agree(folder: Path) -> None:
    images = pictures(3, 40, 40)
    scores = build(folder)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(build(folder, batch=2)(images, PROMPTS, [{}] * 3), scores)
    half = build(folder, dtype="bf16")(images, PROMPTS, [{}] * 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=0.03, rtol=0)
    assert not half.requires_grad


def test_safetensors_are_read_as_well(folder: Path, state: dict[str, Tensor]) -> None:
    path = folder / "hps.safetensors"
    save_file(state, path)
    found = hpsv2.build(model=str(path), processor=str(folder), device="cpu")
    images = pictures(3)
    expected = build(folder)(images, PROMPTS, [{}] * 3)
    assert torch.equal(found(images, PROMPTS, [{}] * 3), expected)


def test_weights_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    def refused(changes: dict[str, Tensor], without: str = "") -> str:
        given = {name: value for name, value in {**state, **changes}.items() if name != without}
        save_file(given, tmp_path / "it.safetensors")
        with pytest.raises(ValueError, match=r"reward 'hpsv2': '.*it\.safetensors'") as caught:
            hpsv2.build(model=str(tmp_path / "it.safetensors"), processor=str(folder))
        return str(caught.value)

    assert "'visual.head.weight' is not a name of open_clip's" in refused(
        {"visual.head.weight": torch.ones(1)}
    )
    assert "'visual_projection.weight' is missing" in refused({}, without="visual.proj")
    assert "no CLIP of open_clip: text_projection" in refused({}, without="text_projection")
    assert "'vision_model.pre_layrnorm.bias' has another shape" in refused(
        {"visual.ln_pre.bias": torch.ones(3)}
    )


def test_names_are_translated_one_to_one(state: dict[str, Tensor]) -> None:
    found = _open_clip.translate(state)
    assert sum(v.numel() for v in found.values()) == sum(v.numel() for v in state.values())
    assert torch.equal(
        found["text_model.encoder.layers.1.self_attn.k_proj.weight"],
        state["transformer.resblocks.1.attn.in_proj_weight"][TEXT : 2 * TEXT],
    )
