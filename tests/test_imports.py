"""What importing a part of the package does not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
