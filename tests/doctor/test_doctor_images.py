"""What the doctor estimates of models whose prompts bring images."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.trainer import family_checks
from sfgrpo.doctor import footprint
from tests.support import families


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "without"),
    [("flux-kontext", "flux"), ("wan-i2v", "wan"), ("wan22-ti2v-start", "wan22-ti2v")],
)
def test_images_of_prompts_are_in_the_estimate(name: str, without: str, tmp_path: Path) -> None:
    """They are kept with the prompts' embeddings, and go through the autoencoder."""
    found = []
    for family in (name, without):
        folder = families.save(family, tmp_path / family)
        recipe = family_checks.recipe(family, folder, tmp_path / f"{family}-run")
        _, (work,) = footprint.measure(recipe, 1, (False,))
        found.append(work)
    assert found[0].rollout > found[1].rollout
    assert found[0].embedding > found[1].embedding
