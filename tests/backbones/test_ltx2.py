"""The sound of LTX-2, in one trajectory with its video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trainer import family_checks
from sfgrpo import ops
from sfgrpo.doctor import footprint
from sfgrpo.rollout import START
from tests.support import families
from tests.support.families import FAMILIES, PROMPTS, sound
from tests.support.rewards import Loudness

FAMILY = FAMILIES["ltx2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("ltx2", tmp_path_factory.mktemp("ltx2") / "model")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return family_checks.load("ltx2", folder)


def noise(backbone: Any) -> torch.Tensor:
    shape = backbone.latent_shape(*FAMILY.size)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))


def test_sound_lies_in_further_channels(backbone: Any) -> None:
    """Five moments of eight numbers on the 3 x 4 x 4 places of five frames, then eight places
    that are nobody's: nothing changes them, and nothing is changed by them."""
    assert backbone.latent_shape(32, 32, 5) == (4 + 1, 3, 4, 4)
    assert backbone.latent_shape(64, 32, 49) == (4 + 1, 25, 8, 4)
    x, t = noise(backbone), torch.tensor([0.9, 0.3])
    cond = backbone.encode(PROMPTS)
    other = x.clone()
    other[:, 4].flatten(1)[:, 40:] += 1
    with torch.no_grad():
        v = backbone.velocity(backbone.transformer, x, t, cond)
        assert torch.equal(backbone.velocity(backbone.transformer, other, t, cond), v)
    heard, nobody = v[:, 4].flatten(1).split([40, 8], 1)
    assert heard.count_nonzero() == heard.numel()
    assert not nobody.any()
    assert torch.equal(backbone.sound(other), backbone.sound(x))
    assert torch.equal(backbone.decode(other), backbone.decode(x))


@pytest.mark.slow
def test_sound_is_that_of_the_stock_pipeline(folder: Path, backbone: Any) -> None:
    shape, pipeline = backbone.latent_shape(*FAMILY.size), family_checks.stock(folder, FAMILY)
    rows = torch.arange(len(PROMPTS))
    x = ops.philox_normal(shape, seed=family_checks.SEED, sample_ids=rows, step_ids=START)
    _, expected = pipeline(
        prompt=PROMPTS, height=32, width=32, guidance_scale=1.0, audio_guidance_scale=1.0,
        num_inference_steps=family_checks.STEPS, max_sequence_length=FAMILY.length,
        latents=FAMILY.given(x), output_type="pt", return_dict=False, **FAMILY.also(pipeline, x),
        **FAMILY.stock,
    )  # fmt: skip
    found = backbone.sound(family_checks.ours(backbone, FAMILY, 1.0))
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert backbone.sound_rate == 24_000


@pytest.mark.slow
def test_the_later_network_and_guidance_of_its_own_for_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LTX-2.3: the same pipeline around a network and connectors with other parts."""
    monkeypatch.setitem(FAMILIES, "ltx23", sound.LTX23)
    folder = families.save("ltx23", tmp_path / "model")
    found = family_checks.parity("ltx23", folder, 3.0)
    assert found.latents <= 2e-5 * found.spread
    assert found.samples <= 2e-6


@pytest.mark.slow
def test_rewards_hear_what_is_trained(folder: Path, tmp_path: Path) -> None:
    """Of clean estimates and of final samples, in training and where it is measured."""
    Loudness.heard.clear()
    reward = "{'tests.support.rewards:Loudness': 1}"
    _, metrics = family_checks.train("ltx2", folder, tmp_path / "run", reward=reward)
    assert metrics["grad_norm"] > 0
    assert metrics["moved"] > 1e-4
    assert len(Loudness.heard) > 2 * 4 + 6  # four samples before and after, six trajectories
    assert {(tuple(s.waveform.shape), s.rate) for s in Loudness.heard} == {((2, 68), 24_000)}


def test_text_fills_whole_registers(folder: Path) -> None:
    made = family_checks.load("ltx2", folder, text_encoders="only", max_sequence_length=20)
    assert made.pipeline.transformer is made.pipeline.vocoder is made.pipeline.audio_vae is None
    with pytest.raises(ValueError, match=r"max_sequence_length: must be a multiple of 8,.*20"):
        made.encode(PROMPTS)
    made = family_checks.load("ltx2", folder, text_encoders="absent")
    assert made.pipeline.text_encoder is made.pipeline.connectors is None


@pytest.mark.slow
def test_the_doctor_counts_connectors_and_what_makes_sound(
    folder: Path, backbone: Any, tmp_path: Path
) -> None:
    recipe = family_checks.recipe("ltx2", folder, tmp_path / "run")
    _, (work,) = footprint.measure(recipe, 1, (False,))
    parts = backbone.pipeline.components
    held = {
        name: sum(p.nbytes for p in (*parts[name].parameters(), *parts[name].buffers()))
        for name in ("text_encoder", "connectors", "vae", "audio_vae", "vocoder")
    }
    assert work.encoders == pytest.approx(held["text_encoder"] + held["connectors"], rel=0.01)
    assert work.others == pytest.approx(sum(held.values()), rel=0.01)
    assert work.embedding > 0
