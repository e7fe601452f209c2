"""Letters that HunyuanVideo 1.5 and HunyuanImage are to show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.trainer import family_checks
from sfgrpo import backbones
from sfgrpo.prompts import Prompt
from tests.support import families

TEXTS = ['a sign "TEA" in the rain', "an orange two"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hunyuanvideo15", "hunyuanimage"])
def test_what_stands_in_quotation_marks_is_read_as_by_the_stock_pipeline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a text encoder of its own, beside prompts that show no letters."""
    monkeypatch.setattr(family_checks, "PROMPTS", TEXTS)
    monkeypatch.setattr(families.Family, "prompts", lambda _: [Prompt(t, {}) for t in TEXTS])
    folder = families.save(name, tmp_path)
    found = family_checks.parity(name, folder, 1.0)
    assert found.latents <= 4 * torch.finfo(torch.float32).eps * found.spread
    made = family_checks.load(name, folder, text_encoders="only")
    read = made.encode(TEXTS).extra["glyphs_stand"].sum(1)
    assert read.tolist() == [len('Text "TEA". ') + 1, 0]  # bytes, and an end


def test_a_network_that_reads_where_a_step_ends_is_refused() -> None:
    pipeline = families.several.hunyuanimage(guidance_embeds=True, use_meanflow=True)
    with pytest.raises(ValueError, match=r"model.path: .*distilled network.*no velocity"):
        backbones.load("hunyuanimage", "none", pipeline=pipeline)
