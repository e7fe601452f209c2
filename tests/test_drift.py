"""The budget of each step against the drift that perturbed velocities really cause."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import config, drift, ops, sde

SD35 = torch.tensor(
    [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0],
    dtype=torch.float64,
)
"""Stable Diffusion 3.5's schedule, shift 3 and 10 steps."""
ROWS, SHAPE = 64, (16, 8, 8)
D = 1024


@pytest.mark.parametrize("sampler", ["ddim", "flow", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_drift_is_what_the_budget_says(sampler: str, guidance: float) -> None:
    """Velocities of the size that the budget supposes, off by a relative error of .005: every
    step's mean drift is at most its budget for that error, and at least a quarter of it."""
    table = sde.coefficients(SD35, sampler, 0.7)
    allowed = drift.budget(table, tolerance=0.005, guidance=guidance, elements=D)
    draw = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return torch.randn(ROWS, *SHAPE, generator=draw) * scale

    for step, (coef, most) in enumerate(zip(table, allowed, strict=True)):
        if coef[2] == 0:
            assert most == float("inf")
            continue
        x, v, v_uncond = normal(), normal(drift.VELOCITY), normal(drift.VELOCITY)
        rows = coef.expand(ROWS, 4)
        keys = {"guidance": guidance, "v_uncond": v_uncond} if guidance != 1 else {}
        x_next = ops.sde_step(x, v, rows, noise=normal(), **keys)[0]
        there = ops.sde_logprob(x, v, x_next, rows, **keys)
        error = 0.005 * drift.VELOCITY
        if keys:
            keys["v_uncond"] = v_uncond + normal(error)
        here = ops.sde_logprob(x, v + normal(error), x_next, rows, **keys)
        measured = (here - there).abs().mean().item()
        assert most / 4 < measured < most, step


def test_what_is_allowed_follows_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(device: str = "cpu", **keys: str) -> float:
        changes = [(key.replace("__", "."), value) for key, value in keys.items()]
        return drift.tolerance(config.load("embedded", changes), torch.device(device))

    assert allowed() < allowed(model__dtype="fp16") < allowed(model__dtype="bf16")
    assert allowed(train__drift_budget="0.5") == 0.5
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert allowed("cuda") == allowed()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert allowed("cuda") == drift.TF32
