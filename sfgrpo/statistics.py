"""The numbers of an iteration: what the rewards, ratios and gradients looked like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from sfgrpo import engine, ops
from sfgrpo.credit import Rewards, gains
from sfgrpo.drift import Drift
from sfgrpo.loss import Rows
from sfgrpo.tally import Tally


def finite_groups(rewards_PNS: Tensor) -> Tensor:
    """bool `[P]`: the groups whose rewards are all finite."""
    return rewards_PNS.isfinite().flatten(1).all(1)


def reward_statistics(rewards: Rewards) -> dict[str, Any]:
    """Means over the iteration's trajectories, without groups that hold a reward that is not
    finite; `dropped_groups` counts those.

    `reward`, the weighted sum, and its components belong to final images; `reward_per_state` to the
    clean estimates of states 0 .. T; `gain_per_step` is the mean |gain| of each step. Of several
    rewards each has all of these, as `gain_per_step.<name>`; one that scored final images alone
    grows evenly to its score.
    """
    kept_P = finite_groups(rewards.total)
    kept = rewards[kept_P]
    return {
        "reward": kept.total[..., -1].double().mean().item(),
        "reward_std_in_group": _std_in_group(kept.total),
        **{name: scores[..., -1].double().mean().item() for name, scores in kept.scores.items()},
        **_along(kept.total),
        "dropped_groups": int((~kept_P).sum()),
        **(_of_components(kept) if len(kept.scores) > 1 else {}),
    }


def _of_components(kept: Rewards) -> dict[str, Any]:
    found = {}
    for name, scores in kept.scores.items():
        found[f"reward_std_in_group.{name}"] = _std_in_group(scores)
        found |= {f"{key}.{name}": values for key, values in _along(scores).items()}
    return found


def _std_in_group(rewards_PNS: Tensor) -> float:
    """Of final images."""
    return rewards_PNS[..., -1].double().std(dim=1, unbiased=False).mean().item()


def _along(rewards_PNS: Tensor) -> dict[str, list[float]]:
    """Along the trajectory."""
    return {
        "reward_per_state": rewards_PNS.double().mean((0, 1)).tolist(),
        "gain_per_step": gains(rewards_PNS).double().abs().mean((0, 1)).tolist(),
    }


def total_cost(tally: Tally, device: torch.device, *, context: int = 1) -> dict[str, int]:
    """What an iteration cost on all ranks together (a collective), of which `context` neighbours
    computed each row together, and counted it."""
    counts = _all_ranks(torch.tensor([astuple(tally)], device=device)).sum(0).tolist()
    total = Tally(*counts)
    total.velocity, total.gradient = total.velocity // context, total.gradient // context
    return total.counts()


class RowStatistics:
    """Collects per-row statistics over micro-batches and optimiser steps; means over all ranks."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.differences: list[Tensor] = []
        self.drift: Drift | None = None
        self.norms: list[float] = []
        self.skipped = 0

    def add(self, stats: ops.PolicyStats, step: Tensor) -> None:
        """One micro-batch, of rows at the steps `step [R]`."""
        self.steps.append(step)
        self.rows.append(torch.stack([stats.ratio, stats.clipped, stats.kl, stats.surrogate], 1))

    def compare(self, logp: Tensor, rows: Rows) -> None:
        """The log-density `[R]` of rows by the training forward, before any update."""
        difference = (logp - rows.logp_sampling).abs().double()
        self.differences.append(torch.stack([difference, rows.step.double()], 1))

    def measure_drift(self, steps: int) -> Drift:
        """The drift over a sampler of so many steps; call it before the first update."""
        difference, step = _all_ranks(torch.cat(self.differences)).unbind(1)
        per_step = _per_step(difference, step.long(), steps)
        self.drift = Drift(difference.mean().item(), difference.max().item(), per_step)
        return self.drift

    def add_step(self, norm: float, *, taken: bool) -> None:
        """The gradient norm of one optimiser step, or that it was skipped (fp16 overflow)."""
        if taken:
            self.norms.append(norm)
        else:
            self.skipped += 1

    def summary(self, beta: float, drift_budget: Sequence[float]) -> dict[str, Any]:
        """Means over all rows, and the drift that was measured beside its budget."""
        rows = _all_ranks(torch.cat(self.rows)).double()
        drift, steps = self.drift or Drift(math.nan, math.nan, []), len(drift_budget)
        step = _all_ranks(torch.cat(self.steps)).long()
        ratio, clipped, kl, surrogate = rows.unbind(1)
        return {
            "loss": (surrogate + beta * kl).mean().item(),
            "kl": kl.mean().item(),
            "clip_fraction": clipped.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "clip_fraction_per_step": _per_step(clipped, step, steps),
            "ratio_deviation_per_step": _per_step((ratio - 1).abs(), step, steps),
            "logp_drift_mean": drift.mean,
            "logp_drift_max": drift.largest,
            "logp_drift_per_step": drift.per_step,
            "logp_drift_of_budget": drift.of(drift_budget),
            "grad_norm": sum(self.norms) / max(1, len(self.norms)),
        }


def _per_step(values: Tensor, step: Tensor, steps: int) -> list[float]:
    """The mean at each step of a sampler; 0 at steps without rows."""
    zeros = values.new_zeros(steps)
    rows = zeros.index_add(0, step, torch.ones_like(values)).clamp(min=1)
    return (zeros.index_add(0, step, values) / rows).tolist()


def _all_ranks(local: Tensor) -> Tensor:
    start = engine.rank() * len(local)
    return engine.gather(local, torch.arange(start, start + len(local), device=local.device))
