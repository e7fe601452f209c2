"""The times that CogView4's network is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfgrpo import backbones
from tests.support.families import FAMILIES, scheduler

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75}


@pytest.mark.parametrize(
    "options",
    [{**DYNAMIC, "time_shift_type": "linear"}, {**DYNAMIC, "base_shift": 0.9}, {"shift": 3.0}, {}],
    ids=["linear", "exponential", "fixed", "none"],
)
def test_noise_levels_are_taken_back_to_whole_times(options: dict[str, Any]) -> None:
    """At the schedule's levels to those of the stock pipeline, between them to the nearest."""
    pipeline = FAMILIES["cogview4"].build()
    pipeline.scheduler = scheduler(**options)
    made: Any = backbones.load("cogview4", "none", pipeline=pipeline)
    shape = made.latent_shape(1024, 768)
    sigmas = made.sigmas(50, shape)
    expected = torch.linspace(1000, 1, 50, dtype=torch.float64).long()
    assert torch.equal(made._times(sigmas[:-1], shape), expected.float())
    between = (sigmas[1:-1] + sigmas[:-2]) / 2
    found = made._times(between, shape)
    assert torch.equal(found, found.round())
    assert ((found < expected[:-1]) & (found > expected[1:])).all()
