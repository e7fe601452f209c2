"""The verdicts on diffusers' flow-matching pipelines: one on each, and the table of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.trainer import flow_pipelines

WRITTEN = Path(flow_pipelines.__file__).parents[1] / "results" / "flow_pipelines.md"


def test_every_flow_pipeline_has_a_verdict() -> None:
    """A newer diffusers with another one fails here, until somebody has looked at it."""
    assert len(flow_pipelines.flows()) > 100
    assert WRITTEN.read_text(encoding="utf-8") == flow_pipelines.table() + "\n"


def test_a_pipeline_without_a_verdict_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = flow_pipelines.verdicts()
    lost, kept = known.pop("FluxPipeline"), {**known, "NoSuchPipeline": ("could", "why")}
    monkeypatch.setattr(flow_pipelines, "verdicts", lambda: kept)
    with pytest.raises(ValueError, match=r"verdict: \['FluxP.*not in diffusers: \['NoSuchP"):
        flow_pipelines.table()
    assert lost == ("served", "flux")
