"""Prompts longer than a text encoder reads are counted, by what each family really tokenizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainer import family_checks
from sfgrpo.backbones.sd3 import load
from tests.support import families

NAMES = ("flux", "flux2", "flux2-klein", "qwenimage", "wan", "zimage", "lumina2", "krea2")
"""One of each way to tokenize; the tiny tokenizers' tokens are characters or bytes."""


def said(backbone: Any, *prompts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        backbone.encode(list(prompts))
    return [str(w.message) for w in told if "lose their ends" in str(w.message)]


def test_the_embedded_model_says_it_once() -> None:
    backbone = load("embedded", max_sequence_length=0)
    parts = dict(backbone.pipeline.config)
    fits, long = "a red seven on a blue background", "a red seven on a blue background " * 40
    assert said(backbone, fits, "") == []
    (line,) = said(backbone, long + "a cat", fits, long + "a dog", fits)
    assert line.startswith("2 of 3 prompts are longer than a text encoder reads")
    assert said(backbone, long) == []
    assert dict(backbone.pipeline.config) == parts
    assert type(backbone.pipeline.tokenizer).__name__ != "_Watched"


@pytest.mark.parametrize("name", NAMES)
def test_every_family_counts_by_its_own_length(name: str, tmp_path: Path) -> None:
    backbone: Any = family_checks.load(name, families.save(name, tmp_path))
    assert said(backbone, "a cat", "") == []
    longer = backbone.max_sequence_length + 8
    found = said(backbone, "a" * longer, "a cat", "b" * longer, "a" * longer)
    assert [line[:9] for line in found] == ["2 of 3 pr"]
