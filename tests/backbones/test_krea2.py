"""Krea 2 beyond what all families share: Turbo's schedule, and prompts without their padding."""

from __future__ import annotations

from typing import Any

import torch

from sfgrpo import backbones
from tests.support import families
from tests.support.families import FAMILIES, PROMPTS


def test_turbo_has_one_schedule_for_all_sizes() -> None:
    """As its pipeline, which asks its own configuration."""
    pipeline = families.qwen3.krea2(is_distilled=True)
    turbo: Any = backbones.load("krea2", "none", pipeline=pipeline)
    raw: Any = backbones.load("krea2", "none", pipeline=FAMILIES["krea2"].build())
    small, large = (4, 4, 4), (4, 32, 32)
    assert torch.equal(turbo.sigmas(8, small), turbo.sigmas(8, large))
    assert not torch.equal(raw.sigmas(8, small), raw.sigmas(8, large))
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist(), mu=1.15)
    torch.testing.assert_close(turbo.sigmas(8, small), scheduler.sigmas)


def test_a_prompt_keeps_its_tokens_in_order_and_no_padding() -> None:
    pipeline = FAMILIES["krea2"].build()
    made: Any = backbones.load("krea2", "none", pipeline=pipeline, max_sequence_length=256)
    states, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=256)
    assert (mask.sum(1) < mask.shape[1]).all()  # there is padding, of unlike length
    assert mask[0].sum() != mask[1].sum()
    for row, kept in enumerate(made.encode(PROMPTS).unpadded()):
        assert torch.equal(kept, states[row, mask[row]].flatten(1))
