"""The numbers of an iteration: what the rewards, ratios and gradients looked like."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfgrpo import engine, ops
from sfgrpo.credit import gains
from sfgrpo.loss import Rows


def reward_statistics(rewards_PNS: Tensor, parts_PN: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over the iteration's trajectories.

    `reward` and its components belong to final images; `reward_per_state` to the clean estimates
    of states 0 .. T; `gain_per_step` is the mean |gain| of each step.
    """
    final = rewards_PNS[..., -1].double()
    return {
        "reward": final.mean().item(),
        "reward_std_in_group": final.std(dim=1, unbiased=False).mean().item(),
        **{name: values.double().mean().item() for name, values in parts_PN.items()},
        "reward_per_state": rewards_PNS.double().mean((0, 1)).tolist(),
        "gain_per_step": gains(rewards_PNS).double().abs().mean((0, 1)).tolist(),
    }


class RowStatistics:
    """Collects per-row statistics over micro-batches and optimiser steps; means over all ranks."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.drift: list[Tensor] = []
        self.norms: list[float] = []
        self.skipped = 0

    def add(self, stats: ops.PolicyStats, rows: Rows, *, first: bool) -> None:
        """One micro-batch; `first` if no update was made since the rows were sampled."""
        self.rows.append(torch.stack([stats.ratio, stats.clipped, stats.kl, stats.surrogate], 1))
        if first:
            self.drift.append((stats.logp - rows.logp_old).abs())

    def add_step(self, norm: float, *, taken: bool) -> None:
        """The gradient norm of one optimiser step, or that it was skipped (fp16 overflow)."""
        if taken:
            self.norms.append(norm)
        else:
            self.skipped += 1

    def summary(self, beta: float) -> dict[str, float]:
        """`logp_drift` is |logp in training - logp at sampling| before the first update: rounding,
        if rollout and training agree."""
        rows = _all_ranks(torch.cat(self.rows)).double()
        drift = _all_ranks(torch.cat(self.drift)).double()
        ratio, clipped, kl, surrogate = rows.unbind(1)
        return {
            "loss": (surrogate + beta * kl).mean().item(),
            "kl": kl.mean().item(),
            "clip_fraction": clipped.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "logp_drift_mean": drift.mean().item(),
            "logp_drift_max": drift.max().item(),
            "grad_norm": sum(self.norms) / max(1, len(self.norms)),
        }


def _all_ranks(local: Tensor) -> Tensor:
    start = engine.rank() * len(local)
    return engine.gather(local, torch.arange(start, start + len(local), device=local.device))


class Clock:
    """Seconds per phase of an iteration."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`."""
        now = time.perf_counter()
        self.laps[phase] = round(self.laps.get(phase, 0.0) + now - self.last, 4)
        self.last = now
