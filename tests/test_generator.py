"""A recipe's keys reach its backbone, with weights and without."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfgrpo import backbones, config, generator
from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.doctor.skeleton import skeleton
from sfgrpo.trainer import Trainer


def test_every_option_of_the_families_is_a_key() -> None:
    """`device` is the process's, `weights` the engine's, `pipeline` the doctor's, the rest is
    diffusers'."""
    takes = set(inspect.signature(PipelineBackbone.load).parameters)
    said = generator.options(config.load("embedded"))
    assert takes - {"path", "device", "weights", "pipeline", "from_pretrained"} == set(said)
    edits = generator.options(config.load("embedded", [("model.backbone", "flux_kontext")]))
    more = set(inspect.signature(ImagesBackbone.load).parameters) - {"path", "options"}
    assert set(edits) == set(said) | more


def test_a_backbone_of_ones_own_is_told_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(backbones, "load", lambda *args, **options: asked.append((args, options)))
    keys = [
        ("model.backbone", "tests.support.toy:load"),
        ("model.dtype", "bf16"),
        ("model.path", "x"),
        ("model.options", "{a: 1}"),
    ]
    generator.load(config.load("embedded", keys), "cpu")
    told = {"device": "cpu", "dtype": torch.bfloat16, "options": {"a": 1}}
    assert asked == [(("tests.support.toy:load", "x"), told)]


def test_the_doctor_hears_of_an_option_that_a_run_would_refuse() -> None:
    with pytest.raises(ValueError, match=r"model.attention: unknown backend 'flesh'"):
        skeleton(config.load("embedded", [("model.attention", "flesh")]))


def edits(tmp_path: Path, *sizes: tuple[int, int], **keys: str) -> config.Recipe:
    """A recipe of an editing model with images of these (width, height)."""
    for row, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{row}.png")
    lines = [{"prompt": "x", "image": f"{row}.png"} for row in range(len(sizes))]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "model.backbone": "flux_kontext", "prompts": str(tmp_path / "edits.jsonl"),
        "eval.held_out": "0", **{key.replace("__", "."): value for key, value in keys.items()},
    }  # fmt: skip
    return config.load("embedded", list(given.items()))


def test_prompts_bring_what_the_backbone_takes(tmp_path: Path) -> None:
    recipe = edits(tmp_path, (64, 64), (80, 80))  # both become 1024 x 1024
    assert [p.images for p in generator.prompts_of(recipe).train] == [
        (str(tmp_path / "0.png"),), (str(tmp_path / "1.png"),)
    ]  # fmt: skip
    texts = edits(tmp_path, (64, 64), model__backbone="flux")
    with pytest.warns(UserWarning, match="line 1: backbone 'flux' takes no images, so"):
        assert generator.prompts_of(texts).train[0].images == ()
    blind = edits(tmp_path, prompts="signs")
    with pytest.raises(ValueError, match=r"signs, line 1: this backbone takes 1 image .* got none"):
        generator.prompts_of(blind)


def test_images_that_become_unlike_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    said = (
        r"line 2: its images are resized to 832 x 1248, those of .*line 1 to 1024 x 1024 .*"
        r"set model\.image_resolution"
    )
    with pytest.raises(ValueError, match=said):
        Trainer(edits(tmp_path, (64, 64), (96, 64)))
    assert generator.prompts_of(edits(tmp_path, (64, 64), (96, 64), model__image_resolution="512"))


def test_images_are_prepared_for_one_size(tmp_path: Path) -> None:
    for key in ("eval__resolution", "eval__num_frames"):
        with pytest.raises(ValueError, match=r"eval\.resolution and eval\.num_frames: images of"):
            generator.prompts_of(edits(tmp_path, (64, 64), **{key: "64"}))


def test_images_that_a_model_does_not_take_are_told_with_their_row(tmp_path: Path) -> None:
    flux2 = {"model__backbone": "flux2_edit"}
    for size in ((40, 64), (600, 70)):
        with pytest.raises(ValueError, match=r"line 2: FLUX.2 takes .* not \d+ x \d+"):
            generator.prompts_of(edits(tmp_path, (64, 64), size, **flux2))
    resized = edits(tmp_path, (64, 64), (40, 64), **flux2, model__image_resolution="64")
    assert len(generator.prompts_of(resized).train) == 2


def test_sizes_of_images_are_refused_where_there_are_none(tmp_path: Path) -> None:
    for name, why in (("flux", "takes no images"), ("tests.support.toy:PointBackbone", "takes no")):
        keys = {"model__backbone": name, "model__image_resolution": "64"}
        with pytest.raises(ValueError, match=f"model.image_resolution: backbone '{name}' {why}"):
            generator.prompts_of(edits(tmp_path, (64, 64), **keys))


def test_a_size_that_cannot_be_names_its_section() -> None:
    backbone: Any = skeleton(config.load("embedded"))
    for section in ("model", "eval"):
        given = config.load("embedded", [(f"{section}.resolution", "[32, 33]")])
        message = f"^{section}.resolution, {section}.num_frames: width must be .*, got 33$"
        with pytest.raises(ValueError, match=message):
            generator.shapes(given, backbone)


def test_a_model_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    given = config.load("embedded", [("model.path", str(tmp_path))])
    with pytest.raises(OSError, match=f"^model.path '{tmp_path}': .*model_index.json.*$") as said:
        generator.load(given, "cpu")
    assert "\n" not in str(said.value)


def test_a_relative_path_from_another_folder_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise OSError("no model_index.json")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbones, "load", absent)
    given = config.load("embedded", [("model.path", "models/mine")])
    with pytest.raises(OSError, match=f"no such folder in '{tmp_path}', and as a Hub id: no model"):
        generator.load(given, "cpu")
