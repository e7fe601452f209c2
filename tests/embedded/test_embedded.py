"""The embedded model: its data, its judges, its pretraining, and the weights that are shipped."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfgrpo.backbones import sd3
from sfgrpo.embedded import architecture, data, judges
from sfgrpo.embedded import pretrain as pretraining
from sfgrpo.embedded.evaluate import evaluate
from sfgrpo.embedded.pretrain import pretrain

EMBEDDED = Path(data.__file__).parent
MODEL = EMBEDDED / "model"


def sampled(count: int, split: slice = data.PRETRAINING_DIGITS, seed: int = 0) -> data.Batch:
    return data.sample(count, split=split, generator=torch.Generator().manual_seed(seed))


def test_splits_share_no_digit() -> None:
    rows = range(1797)
    pretraining, judging = rows[data.PRETRAINING_DIGITS], rows[data.JUDGE_DIGITS]
    assert (len(pretraining), len(judging)) == (1197, 600)
    assert not set(pretraining) & set(judging)
    masks, labels = data.digits(data.JUDGE_DIGITS)
    assert masks.shape == (600, 8, 8)
    assert (float(masks.min()), float(masks.max())) == (0.0, 1.0)
    assert labels.bincount().min() > 50


def test_prompts_are_every_digit_in_every_readable_pair() -> None:
    prompts = data.prompts()
    assert len({entry["prompt"] for entry in prompts}) == len(prompts) == 460
    assert data.record(7, "red", "yellow")["prompt"] == "a red seven on a yellow background"
    assert data.record(2, "orange", "black")["prompt"] == "an orange two on a black background"
    # The extremes of WCAG 2, and its symmetry.
    assert data.contrast("white", "white") == 1
    assert 15 < data.contrast("white", "black") == data.contrast("black", "white") <= 21
    assert min(data.contrast(f, b) for f, b in data.colour_pairs()) >= data.MIN_CONTRAST
    assert (EMBEDDED / "prompts.jsonl").read_text(encoding="utf-8") == data.as_jsonl(prompts)


def test_images_have_the_colours_of_their_captions() -> None:
    batch = sampled(64)
    assert batch.images.shape == (64, 3, 32, 32)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    corner = batch.images[:, :, 0, 0]
    backgrounds = torch.stack([data.colour(r["background"]) for r in batch.records])
    torch.testing.assert_close(corner, backgrounds)
    assert [int(r["text"]) for r in batch.records] == batch.labels.tolist()
    assert torch.equal(sampled(64).images, batch.images)
    assert not torch.equal(sampled(64, seed=1).images, batch.images)


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = architecture.build_tokenizer()
    for entry in data.prompts():
        tokens = tokenizer.tokenize(entry["prompt"])
        assert [token.removesuffix("</w>") for token in tokens] == entry["prompt"].split()
        assert len(tokens) + 2 <= architecture.MAX_TOKENS


def by_digit(per_digit: int, split: slice) -> Tensor:
    """Real images [10, per_digit, 3, 32, 32]."""
    batch = sampled(60 * per_digit, split)
    return torch.stack([batch.images[batch.labels == d][:per_digit] for d in range(10)])


def test_judges_on_real_digits_they_were_not_fitted_on() -> None:
    images = by_digit(24, data.PRETRAINING_DIGITS)
    metadata = [{"text": str(digit)} for digit in range(10)]
    numbers = judges.judge(images, metadata)
    assert numbers["classifier_accuracy"] > 0.88  # measured: 0.936 on 2,000
    assert 0.2 < numbers["diversity"] < 0.35
    assert numbers["distance_to_real"] < 1.0
    wrong = judges.judge(images, [*metadata[1:], metadata[0]])
    assert wrong["classifier_accuracy"] < 0.05


def test_judges_see_what_a_reward_does_not() -> None:
    images = by_digit(24, data.PRETRAINING_DIGITS)
    real = judges.distance_to_real(images.flatten(0, 1))
    same = images[:, :1].expand(-1, 24, -1, -1, -1)
    assert judges.diversity(same) == pytest.approx(0, abs=1e-6)
    assert judges.distance_to_real(same.flatten(0, 1)) > 2 * real
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2) * 0.3
    assert judges.distance_to_real((images.flatten(0, 1) + board).clamp(0, 1)) > 2 * real
    noise = torch.rand(240, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert judges.distance_to_real(noise) > 20 * real


def test_judges_ignore_colour_and_need_groups() -> None:
    ink = data.enlarge(data.digits(data.JUDGE_DIGITS)[0][:20], torch.Generator().manual_seed(0))
    seen = [
        judges.ink(data.recolour(ink, [data.record(0, f, b)] * 20))
        for f, b in (("white", "black"), ("dark blue", "yellow"))
    ]
    # Blending is linear, so ink is what was blended, whatever the colours.
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="N >= 2"):
        judges.diversity(torch.zeros(3, 1, 3, 32, 32))


@pytest.mark.slow
def test_pretraining_writes_a_whole_folder_and_is_reproducible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {}
    few = functools.partial(evaluate, per_digit=2)  # of 24: reading 240 images takes a while
    monkeypatch.setattr(pretraining, "evaluate", lambda *a, per_digit, **k: few(*a, **k))
    for name, shown in (("first", 0), ("second", 1)):
        scores[name] = pretrain(
            tmp_path / name, seed=5, vae_steps=2, steps=2, latents=80, evaluate_every=shown
        )
    assert scores["first"] == scores["second"]
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert sum(path.suffix == ".safetensors" for path in files) == 4
    for path in files:
        if path.suffix == ".safetensors":
            first, second = tmp_path / "first" / path, tmp_path / "second" / path
            assert first.read_bytes() == second.read_bytes(), path
    card = (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    assert "--seed 5 --vae-steps 2 --steps 2" in card
    assert f"{scores['first']['ocr']:.3f}" in card
    assert sd3.load(tmp_path / "first", max_sequence_length=0).image_size == (32, 32)
    with pytest.raises(ValueError, match="not empty"):
        pretrain(tmp_path / "first")


def test_shipped_weights_are_small_and_of_the_documented_classes() -> None:
    index = json.loads((MODEL / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["text_encoder_3"] == [None, None]
    assert sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file()) <= 10e6
    count = 0
    for path in MODEL.rglob("*.safetensors"):
        count += sum(weight.numel() for weight in load_file(path).values())
    assert 2e6 < count < 4e6


def test_shipped_model_starts_half_legible() -> None:
    """It must be better than chance and leave reinforcement learning something to do."""
    backbone = sd3.load("embedded", max_sequence_length=0)
    scores = evaluate(backbone, per_digit=12)
    assert 0.4 < scores["ocr"] < 0.7
    assert scores["colour"] > 0.7
    assert scores["classifier"] > 0.6
