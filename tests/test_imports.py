"""What importing a part of the package does not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sfgrpo import rewards
from sfgrpo.rewards import colour

HEAVY = ("torch", "deepspeed", "tensorboard", "sfgrpo.ops")


@pytest.mark.parametrize("module", ["sfgrpo.report", "sfgrpo.run.records"])
def test_reading_a_run_needs_nothing_that_trains(module: str) -> None:
    told = f"import json, sys, {module}; print(json.dumps([*sys.modules]))"
    found = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=100
    )
    loaded = set(json.loads(found.stdout))
    assert module in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_reward_of_colours_needs_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the embedded model's package nor scikit-learn, which holds its data."""
    for name in [n for n in sys.modules if n.startswith(("sklearn", "sfgrpo.embedded"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sfgrpo.embedded", None)
    monkeypatch.setattr(rewards, "colour", colour)  # what the import below sets is put back
    monkeypatch.delitem(sys.modules, "sfgrpo.rewards.colour")
    metadata = [{"foreground": "red", "background": "white"}]
    assert rewards.build("colour")(torch.zeros(1, 3, 8, 8), ["a red seven"], metadata).shape == (1,)
