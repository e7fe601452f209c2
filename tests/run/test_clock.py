"""Phases add up, and time spent on other ranks is taken out of them."""

from __future__ import annotations

import time

import pytest
import torch

from sfgrpo import engine
from sfgrpo.run.clock import Clock


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"waiting": 1.0, "communication": 2.0}
    monkeypatch.setattr(engine, "spent", lambda: dict(spent))
    start, clock = time.perf_counter(), Clock()
    time.sleep(0.05)
    spent["waiting"] += 0.03
    clock.lap("rollout")
    time.sleep(0.02)
    spent["communication"] += 0.01
    clock.lap("train")
    clock.lap("checkpoint")
    passed = time.perf_counter() - start
    row = clock.row(8, torch.device("cpu"))
    phases = row["phases"]
    assert phases["waiting"] == pytest.approx(0.03)
    assert phases["communication"] == pytest.approx(0.01)
    assert 0.02 <= phases["rollout"] < passed
    assert row["seconds"] == pytest.approx(sum(phases.values()), abs=1e-3)
    assert row["seconds"] <= passed + 1e-3
    assert sum(row["share"].values()) == pytest.approx(1, abs=1e-3)
    assert row["slowest"] == phases  # of one rank
    work = row["seconds"] - phases["checkpoint"]
    assert row["images_per_second"] == pytest.approx(8 / work, rel=0.02)
