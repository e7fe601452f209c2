"""VideoAlign beside the scores of its published code, on the same weights, videos and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import rewards
from sfgrpo.rewards import _qwen2_vl, _sizes, videoalign
from tests.support import qwen2_vl
from tests.support.clip import pictures
from tests.support.filled import filled

PROMPTS = ["a red seven", "nine", "a red nine a red nine"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
WORDS = ["[PAD]", "[UNK]", *SPECIAL, "a", "red", "seven", "nine", "video", "is", "the", "user"]
RANK, ALPHA = 4, 8
FPS = 2.0
NORMS = {"VQ_mean": 0.1, "VQ_std": 0.5, "MQ_mean": -0.2, "MQ_std": 2.0, "TA_mean": 0, "TA_std": 0.1}
CONFIG: dict[str, Any] = {
    "data_config": {
        "fps": FPS, "max_frame_pixels": 256 * 28 * 28, "num_frames": None, "sample_type": "uniform",
        "prompt_template_type": "detailed_special",
    },
    "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
    "inference_config": NORMS,
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the published file, at these sizes: linear layers of the language model have LoRA."""
    plain = {**qwen2_vl.shapes(len(WORDS) + 3), "rm_head.weight": (1, qwen2_vl.WIDTH)}
    found = {}
    for name, shape in plain.items():
        owner, _, kind = f"base_model.model.{name}".rpartition(".")
        if ".layers." in name and "_proj" in name:
            found[f"{owner}.base_layer.{kind}"] = shape
            if kind == "weight":
                found[f"{owner}.lora_A.default.weight"] = (RANK, shape[1])
                found[f"{owner}.lora_B.default.weight"] = (shape[0], RANK)
        else:
            found[f"{owner}.{kind}"] = shape
    return found


def videos(count: int, frames: int, height: int, width: int) -> Tensor:
    """[B, F, 3, H, W] in whole 255ths."""
    return pictures(count * frames, height, width).unflatten(0, (count, frames))


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    torch.save(state, folder / "checkpoint-1" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videoalign")
    qwen2_vl.config(video_token_id=WORDS.index("<|video_pad|>")).save_pretrained(path)
    qwen2_vl.tokenizer(WORDS, SPECIAL).save_pretrained(path)
    write(path, filled(shapes()), CONFIG)
    return path


def build(folder: Path, **options: Any) -> Any:
    given = {"model": str(folder / "checkpoint-1" / "model.pth"), "settings": str(folder)}
    given |= {"base": str(folder), "device": "cpu", "dtype": "fp32", **options}
    return rewards.build("videoalign", **given)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 336, 308), [
            [-0.175467, 0.042806, 1.280247], [-0.263810, 0.028297, 1.013970],
            [-0.113766, 0.058089, 1.360537],
        ]),
        ((40, 96, 96), [
            [-0.097531, 0.046521, 1.513559], [-0.250965, 0.039793, 1.266800],
            [-0.168975, 0.040418, 1.379745],
        ]),
        ((5, 400, 700), [
            [-0.173863, 0.067789, 2.391701], [-0.332530, 0.041118, 2.128785],
            [-0.278189, 0.056842, 2.713670],
        ]),
    ],
    ids=["as it is", "larger", "smaller"],
)  # fmt: skip
def test_scores_are_the_published_code_s(
    folder: Path, shape: tuple[int, int, int], expected: list[list[float]]
) -> None:
    """Those of `Qwen2VLRewardModelBT` of KwaiVGI/VideoAlign with transformers 4.45.2, its processor
    and peft, for `filled(shapes())`; frames resized by the operations of torchvision 0.18."""
    scores = build(folder).parts(videos(3, *shape), PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (16, 16, [0, 5, 10, 15]),
        (33, 16, [0, 11, 21, 32]),
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (81, 24, [0, 16, 32, 48, 64, 80]),
        (5, 8, [0, 1, 3, 4]),
        (3, 16, [0, 2]),
        (2, 16, [0, 1]),
    ],
)
def test_frames_are_the_published_code_s(count: int, fps: float, expected: list[int]) -> None:
    """Of its `smart_nframes` and `torch.linspace(0, count - 1, n).round()`."""
    assert videoalign.sampled(count, fps=fps, shown=FPS) == expected


def test_sampling_never_shows_too_much() -> None:
    for count in range(2, 40):
        chosen = videoalign.sampled(count, fps=1, shown=FPS)
        assert chosen == torch.linspace(0, count - 1, count // 2 * 2).round().int().tolist()
    assert len(videoalign.sampled(5000, fps=1, shown=FPS)) == 768


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 832), (336, 588)), ((96, 96), (336, 336)), ((100, 700), (140, 840))],
)
def test_sizes_are_the_published_code_s(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Of its `smart_resize` with the published bounds."""
    bounds = {"least": videoalign.LEAST_PIXELS, "most": 256 * 28 * 28}
    assert _qwen2_vl.fitted(*size, factor=28, **bounds) == expected


def test_patches_are_pairs_of_frames() -> None:
    """Each of two frames, one after the other, in blocks of two by two."""
    numbers = torch.arange(4.0)[:, None, None, None] * 10 + torch.arange(4.0).view(2, 2)
    shown = numbers[None].repeat_interleave(14, 3).repeat_interleave(14, 4).expand(1, 4, 3, 28, 28)
    found = _qwen2_vl.patches(shown, patch=14, merge=2, frames=2).unflatten(1, (3, 2, 14 * 14))
    assert found[:, 0, :, 0].tolist() == [[t + p, t + 10 + p] for t in (0, 20) for p in range(4)]
    assert (found == found[:, :1, :, :1]).all()


def test_parts_are_weighed_and_videos_come_whole(folder: Path) -> None:
    shown = videos(3, 9, 64, 64)
    options = {"model": str(folder / "checkpoint-1" / "model.pth"), "settings": str(folder)}
    options |= {"base": str(folder), "dtype": "fp32", "device": "cpu"}
    mixture = rewards.load({"videoalign": 1}, {"videoalign": options | {"batch": 2}})
    total, _ = mixture(shown.requires_grad_(), PROMPTS, [{}] * 3)
    assert not total.requires_grad
    parts = build(folder).parts(shown, PROMPTS)
    torch.testing.assert_close(total, parts.sum(1))
    weighed = build(folder, parts={"MQ": 2, "TA": -1})(shown, PROMPTS, [{}] * 3)
    torch.testing.assert_close(weighed, 2 * parts[:, 1] - parts[:, 2])
    half = build(folder, dtype="bf16").parts(shown, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, parts, atol=0.1, rtol=0)
    assert build(folder)(torch.empty(0, 9, 3, 8, 8), [], []).shape == (0,)


def test_a_prompt_and_samples_that_cannot_be_scored_are_named(folder: Path) -> None:
    reward = build(folder)
    with pytest.raises(ValueError, match=r"the prompt has <\|MQ_reward\|> in it: 'a <\|MQ_rew"):
        reward(videos(1, 4, 8, 8), ["a <|MQ_reward|>"], [{}])
    for shape in ((1, 3, 8, 8), (1, 1, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"at least two frames, got \(1, "):
            reward(torch.zeros(shape), ["a"], [{}])


def test_what_the_doctor_counts(folder: Path) -> None:
    options = {"model": str(folder / "checkpoint-1" / "model.pth"), "dtype": "bf16"}
    count = sum(torch.Size(shape).numel() for shape in shapes().values())
    assert _sizes.size("videoalign", options).bytes == 2 * count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {"VQA": 1}}, "unknown part 'VQA'; did you mean 'VQ'?"),
        ({"parts": {"VQ": float("nan")}}, "parts: VQ must be finite, got nan"),
        ({"parts": {"VQ": 0}}, "needs parts that are not all 0"),
        ({"fps": 0}, "a positive fps, got .* and 0"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_values_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        videoalign.build(model="/nowhere", settings="/nowhere", **options)


def test_a_checkpoint_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(changes: dict[str, Any], config: Any = CONFIG) -> str:
        state = {n: v for n, v in {**filled(shapes()), **changes}.items() if v is not None}
        write(tmp_path, state, config)
        given = {"model": str(tmp_path / "checkpoint-1" / "model.pth"), "settings": str(tmp_path)}
        with pytest.raises(ValueError, match="reward 'videoalign': ") as caught:
            build(folder, **given)
        return str(caught.value)

    half = f"{layer}.lora_B.default.weight"
    assert f"'{half}' is missing" in refused({half: None})
    stray = "base_model.model.visual.lora_A.default.weight"
    assert f"'{stray}' belongs to nothing" in refused({stray: torch.ones(1)})
    assert "'rm_head.weight' should be of shape (1, 32), is None" in refused(
        {"base_model.model.rm_head.weight": None}
    )
    assert "is no Qwen2-VL" in refused({"base_model.model.model.embed_tokens.weight": None})
    assert "model_config.json' lacks 'inference_config'" in refused(
        {}, {key: CONFIG[key] for key in ("data_config", "peft_lora_config")}
    )
    assert "model_config.json' cannot be read: " in refused({}, [])
    other = {"data_config": {**CONFIG["data_config"], "sample_type": "multi_pts"}}
    assert "has ('detailed_special', 'multi_pts', None)" in refused({}, CONFIG | other)
