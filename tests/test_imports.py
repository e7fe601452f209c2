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
OF_PIPELINES = ("diffusers", "transformers", "peft", "sklearn", "pandas")


def loaded(code: str) -> set[str]:
    """The modules that a process has after running `code`."""
    told = f"import json, sys; {code}; print(json.dumps([*sys.modules]))"
    found = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=100
    )
    return set(json.loads(found.stdout))


@pytest.mark.parametrize("module", ["sfgrpo.report", "sfgrpo.run.records"])
def test_reading_a_run_needs_nothing_that_trains(module: str) -> None:
    found = loaded(f"import {module}")
    assert module in found
    assert found.isdisjoint(HEAVY)


def test_a_network_of_ones_own_needs_nothing_of_pipelines() -> None:
    """They take seven of ten seconds to import, before anything that is wrong is said."""
    found = loaded("import sfgrpo.trainer; from sfgrpo.backbones import ModuleBackbone")
    assert "sfgrpo.backbones._module" in found
    assert found.isdisjoint(OF_PIPELINES)


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
