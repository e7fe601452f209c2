"""A recipe's keys reach its backbone, with weights and without."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from sfgrpo import backbones, config, generator
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.doctor.skeleton import skeleton


def test_every_option_of_the_families_is_a_key() -> None:
    """`device` is the process's, `pipeline` the doctor's, the rest is diffusers'."""
    takes = set(inspect.signature(PipelineBackbone.load).parameters)
    said = generator.options(config.load("embedded"))
    assert takes - {"path", "device", "pipeline", "from_pretrained"} == set(said)


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
