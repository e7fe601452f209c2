"""A backbone of two networks, each for its range of times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.trainer import family_checks
from sfgrpo.backbones.wan import Experts
from sfgrpo.run import records
from tests.support import families, training
from tests.support.families import FAMILIES, PROMPTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("wan22", tmp_path_factory.mktemp("experts"))


def test_each_row_runs_the_expert_of_its_time(folder: Path) -> None:
    backbone = family_checks.load("wan22", folder)
    experts = backbone.transformer
    assert isinstance(experts, Experts)
    shape = backbone.latent_shape(*FAMILIES["wan22"].size)
    x = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
    cond = backbone.encode(PROMPTS)
    t = torch.tensor([0.7, 0.6999])  # the boundary itself belongs to the first network
    with torch.no_grad():
        both = backbone.velocity(experts, x, t, cond)
        high, low = (backbone.velocity(part, x, t, cond) for part in (experts.high, experts.low))
    torch.testing.assert_close(both, torch.stack([high[0], low[1]]), rtol=1e-5, atol=1e-5)
    assert (high - low).abs().max() > 0.01
    # With gradients both run, so that ranks whose rows differ still agree on what they average.
    t = torch.tensor([0.95, 0.9])
    v = backbone.velocity(experts, x, t, cond)
    v.square().mean().backward()
    unused = [p.grad for p in experts.low.parameters()]
    assert all(g is not None and not g.any() for g in unused)
    assert torch.equal(v.detach(), backbone.velocity(experts.high, x, t, cond))


def test_two_experts_over_two_ranks_that_hold_no_weight_whole(folder: Path, tmp_path: Path) -> None:
    """ZeRO 3, layer by layer: if ranks whose rows belong to different experts each ran its own
    alone, one would be given the other's weights. Rows one by one, so that they do differ."""
    rows = {"train__micro_batch_size": "1"}
    family_checks.train("wan22", folder, tmp_path / "alone", **rows)
    sharded = {**rows, "deepspeed": "{zero_stage: 3, gather_for_sampling: layer}"}
    recipe = family_checks.recipe("wan22", folder, tmp_path / "both", **sharded)
    training.on_ranks(recipe, 2)
    logs = (records.read(tmp_path / place / "metrics.jsonl") for place in ("alone", "both"))
    for one, two in zip(*logs, strict=True):
        for number in ("reward", "kl", "loss", "grad_norm"):
            assert two[number] == pytest.approx(one[number], rel=2e-2, abs=1e-5), number
