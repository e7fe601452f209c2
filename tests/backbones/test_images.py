"""Backbones whose prompts bring images: one of one's own, and how a family prepares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_stock
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_plus_stock
from PIL import Image
from torch import Tensor

from benchmarks.trainer import family_checks
from sfgrpo import config
from sfgrpo.backbones import flux_kontext
from sfgrpo.backbones import qwenimage_edit as qwen
from sfgrpo.backbones.base import Conditioning
from sfgrpo.run import records
from sfgrpo.trainer import Trainer
from tests.support import families
from tests.support.toy import PointBackbone

SEEN: list[tuple[list[str], list[list[tuple[str, tuple[int, int]]]], tuple[int, int, int]]] = []


class Copies(PointBackbone):
    """Its point is the brightness of a prompt's grey images; of the empty text, minus that."""

    def encode_with_images(
        self, prompts: Sequence[str], images: Sequence[Sequence[Any]],
        size: tuple[int, int, int],
    ) -> Conditioning:  # fmt: skip
        SEEN.append((list(prompts), [[(i.mode, i.size) for i in some] for some in images], size))
        bright = [sum(image.getextrema()[0][0] for image in some) / 255 for some in images]
        signed = [b if text else -b for text, b in zip(prompts, bright, strict=True)]
        return Conditioning(tokens=torch.tensor(signed)[:, None])


def load(path: str, **_: Any) -> Copies:
    made = Copies()
    made.transformer.bend = torch.nn.Parameter(torch.full((1,), 0.1))  # DeepSpeed wants dimensions
    return made


load.takes_images = range(1, 3)  # pyright: ignore[reportFunctionMemberAccess]


class Sources:
    """Scores by, and so tells, what metadata say."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        assert all(Path(entry["image"]).is_file() for entry in metadata)
        return images.mean((1, 2, 3))


def test_a_backbone_of_ones_own_takes_images(tmp_path: Path) -> None:
    """It gets them opened, with the size of the samples; guidance leads away from the negative
    prompt with the same images, row by row."""
    SEEN.clear()
    for row, grey in enumerate((51, 204)):
        Image.new("L", (6 + row, 5), grey).save(tmp_path / f"{row}.png")
    lines = [{"prompt": f"p{row}", "image": f"{row}.png"} for row in range(2)]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = "tests.backbones.test_images"
    keys = {
        "model": f"{{backbone: '{own}:load', path: none, resolution: [8, 16]}}",
        "prompts": str(tmp_path / "edits.jsonl"), "reward": f"{{'{own}:Sources': 1}}",
        "run": f"{{output_dir: {tmp_path / 'run'}, iterations: 1}}", "lora": "null",
        "sample": "{num_steps: 3, prompts_per_iteration: 2, group_size: 3, guidance_scale: 2}",
        "train": "{beta: 0, updates_per_iteration: 1}", "checkpoint": "{every: 1}",
        "eval": "{every: 1, prompts: 2, images_per_prompt: 2, num_steps: 3}",
    }  # fmt: skip
    trainer = Trainer(config.load("embedded", list(keys.items())))
    assert [p.images for p in trainer.prompts.train] == [
        (str(tmp_path / f"{row}.png"),) for row in range(2)
    ]
    trainer.train()
    assert len(records.read(tmp_path / "run" / "eval.jsonl")) == 2
    as_given = [[("RGB", (6, 5))], [("RGB", (7, 5))]]
    first, second = SEEN[:2]
    assert first == (["p0", "p1"], as_given, (8, 16, 1))
    assert second == (["", ""], as_given, (8, 16, 1))
    field = trainer.field(trainer.prompts.train)
    x, t = torch.randn(2, 3, 8, 16), torch.full((2,), 0.5)
    together = field(x, t, torch.tensor([1, 0]))
    unconditional = field.unconditional
    assert unconditional is not None
    torch.testing.assert_close(unconditional.tokens[:, 0], torch.tensor([-0.2, -0.8]))
    for row, prompt in enumerate((1, 0)):  # each row against its own prompt and image
        alone = replace(
            field, conditioning=field.conditioning.rows(torch.tensor([prompt])),
            unconditional=unconditional.rows(torch.tensor([prompt])),
        )  # fmt: skip
        for part, one in zip(together, alone(x[row][None], t[:1], torch.tensor([0])), strict=True):
            assert part is not None
            assert one is not None
            torch.testing.assert_close(part[row], one[0])


def test_prompts_conditioned_unlike_make_no_batch() -> None:
    def made(**extra: Tensor) -> Conditioning:
        return Conditioning(tokens=torch.zeros(1, 2, 3), extra=extra)

    whole = Conditioning.cat([made(image=torch.zeros(1, 2)), made(image=torch.ones(1, 2))])
    assert whole.rows(torch.tensor([1, 0])).extra["image"].tolist() == [[1, 1], [0, 0]]
    assert whole.to("cpu", torch.bfloat16).extra["image"].dtype == torch.bfloat16
    for other in (made(), made(image=torch.zeros(1, 3)), made(latents=torch.zeros(1, 2))):
        with pytest.raises(ValueError, match=r"conditioned unlike: .* as many and as large"):
            Conditioning.cat([made(image=torch.zeros(1, 2)), other])


def test_wan_starts_from_an_image_of_the_videos_size(tmp_path: Path) -> None:
    folder = families.save("wan", tmp_path / "wan")
    with pytest.raises(ValueError, match="this network starts from no image; use backbone 'wan'"):
        family_checks.load("wan-i2v", folder)
    with pytest.raises(ValueError, match=r"model.image_resolution: an image that starts a video"):
        family_checks.load("wan-i2v", folder, image_resolution=(32, 32))
    folder = families.save("wan22-i2v", tmp_path / "i2v")
    with pytest.raises(ValueError, match=r"holds a WanImageToVideoPipeline.*; use 'wan_i2v'"):
        family_checks.load("wan", folder)


def test_the_first_frame_of_ti2v_is_the_image_and_is_not_trained(tmp_path: Path) -> None:
    """At any time and noise its velocity leads to the image, whatever the network says."""
    name = "wan22-ti2v-start"
    made = family_checks.load(name, families.save(name, tmp_path))
    family = families.FAMILIES[name]
    cond = family_checks.encode(made, family)
    x = torch.randn(2, *made.latent_shape(*family.size), requires_grad=True)
    t = torch.tensor([0.9, 0.1])
    v = made.velocity(made.transformer, x, t, cond)
    estimate = x - t.view(-1, 1, 1, 1, 1) * v
    torch.testing.assert_close(estimate[:, :, :1], cond.extra["start"], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(
        v[:, :, 0].square().sum(), list(made.transformer.parameters()), allow_unused=True,
        retain_graph=True,
    )  # fmt: skip
    assert all(grad is None or not grad.any() for grad in grads)
    (seen,) = torch.autograd.grad(v[:, :, 1:].square().sum(), x)
    assert not seen[:, :, 0].any()  # the network sees the image there
    assert seen[:, :, 1:].any()


def test_kontext_resizes_as_its_pipeline_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the trained size of the nearest proportions; here of small ones, for time."""
    small = [(32, 64), (48, 48), (64, 32)]
    for module in (kontext, flux_kontext):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", small)
    families.save("flux-kontext", tmp_path)
    made: Any = family_checks.load("flux-kontext", tmp_path, image_resolution=None)
    pipeline, given = made.pipeline, []
    monkeypatch.setattr(pipeline, "prepare_latents", lambda image, *_: given.append(image) or 1 / 0)
    for size in ((50, 90), (70, 70), (40, 20)):
        image = Image.effect_noise(size, 60).convert("RGB")
        with pytest.raises(ZeroDivisionError):  # it has prepared the image by then
            pipeline(image=image, prompt="a", num_inference_steps=1, max_sequence_length=8)
        found = made._prepared([image], (32, 32, 1))["image"]
        assert torch.equal(found, pipeline._encode_vae_image(given[-1], None))
    assert [tuple(image.shape[-2:]) for image in given] == [(64, 32), (48, 48), (32, 64)]


@pytest.mark.parametrize(
    ("name", "sides"),
    [("qwenimage-edit", [(32, 96)]), ("qwenimage-edit-plus", [(288, 512), (512, 288)])],
)
def test_qwen_resizes_as_its_pipelines_do(
    name: str, sides: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the autoencoder is given and what the text encoder is: of a smaller area, for time."""
    area, dimensions = 64 * 64, qwen.calculate_dimensions
    monkeypatch.setattr(qwen_stock, "calculate_dimensions", lambda _, r: dimensions(area, r))
    monkeypatch.setattr(qwen_plus_stock, "VAE_IMAGE_SIZE", area)
    monkeypatch.setattr(qwen, "AREA", area)
    families.save(name, tmp_path)
    made: Any = family_checks.load(name, tmp_path, image_resolution=None)
    pipeline, given, seen = made.pipeline, [], []
    monkeypatch.setattr(pipeline, "prepare_latents", lambda image, *_: given.append(image) or 1 / 0)
    encode_prompt = pipeline.encode_prompt

    def watched(*, image: Any, **more: Any) -> Any:
        seen.append(image if isinstance(image, list) else [image])
        return encode_prompt(image=image, **more)

    monkeypatch.setattr(pipeline, "encode_prompt", watched)
    sources = [Image.effect_noise(size, 60).convert("RGB") for size in ((50, 90), (70, 40))]
    shown = sources[: len(sides)]
    asked = shown if len(shown) > 1 else shown[0]
    with pytest.raises(ZeroDivisionError):  # it has prepared the images by then
        pipeline(image=asked, prompt="a", num_inference_steps=1, height=32, width=32)
    extra = made.encode_with_images(["a"], [shown], (32, 32, 1)).extra
    (stock,) = given
    pictures = stock if isinstance(stock, list) else [stock]
    for found, pixels in zip(extra.values(), pictures, strict=True):
        assert torch.equal(found, pipeline._encode_vae_image(pixels, None)[:, :, 0])
    theirs, ours = ([(image.size, image.tobytes()) for image in some] for some in seen)
    assert ours == theirs
    assert [size for size, _ in ours] == sides
