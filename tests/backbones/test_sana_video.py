"""The autoencoders that SANA-Video comes with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.trainer import family_checks
from tests.support import families
from tests.support.families import FAMILIES, instructed, sound


@pytest.mark.slow
def test_videos_of_ltx2s_autoencoder_are_those_of_the_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose latents have other statistics, in other places, than those of Wan's."""
    other = replace(
        FAMILIES["sana-video"], build=lambda: instructed.sana_video(vae=sound.ltx2_vae())
    )
    monkeypatch.setitem(FAMILIES, "sana-video", other)
    folder = families.save("sana-video", tmp_path / "model")
    found = family_checks.parity("sana-video", folder, 1.0)
    assert found.latents == 0
    assert found.samples <= 1e-6
