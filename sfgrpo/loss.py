"""Trajectory rows and advantages -> the clipped policy loss and its statistics.

A row is one noisy transition (x_t, x_s) of one trajectory. Rows of all steps, prompts and
trajectories are mixed freely: everything that depends on the step travels with the row, so there
is no loop over timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfgrpo import ops
from sfgrpo.sde import Schedule


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R transitions, a micro-batch."""

    x: Tensor
    """`[R, ...]` state before the step."""
    x_next: Tensor
    """`[R, ...]` state after it, as stored."""
    coef: Tensor
    """fp32 `[R, 4]` the step's coefficients."""
    kl_scale: Tensor
    """fp32 `[R]` factor of the KL (`sfgrpo.sde.kl_scale`)."""
    weight: Tensor
    """fp32 `[R]` weight of the policy term (`sfgrpo.sde.step_weights`)."""
    logp_sampling: Tensor
    """fp32 `[R]` log-density at sampling."""
    advantage: Tensor
    """fp32 `[R]`."""
    prompt: Tensor
    """int64 `[R]` row of the conditioning."""
    step: Tensor
    """int64 `[R]` which step of the sampler."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryRows:
    """All rows of a set of trajectories, gathered only when a micro-batch asks for them."""

    latents_MS: Tensor
    logp_MT: Tensor
    advantages_MT: Tensor
    prompt_M: Tensor
    schedule: Schedule
    """On the same device."""

    def take(self, trajectory: Tensor, step: Tensor) -> Rows:
        """Rows of the pairs `(trajectory [R], step [R])`."""
        return Rows(
            x=self.latents_MS[trajectory, step],
            x_next=self.latents_MS[trajectory, step + 1],
            coef=self.schedule.table[step],
            kl_scale=self.schedule.kl_scale_T[step],
            weight=self.schedule.weight_T[step],
            logp_sampling=self.logp_MT[trajectory, step],
            advantage=self.advantages_MT[trajectory, step],
            prompt=self.prompt_M[trajectory],
            step=step,
        )


def policy_loss(
    rows: Rows,
    v: Tensor,
    v_uncond: Tensor | None,
    v_ref: Tensor | None,
    *,
    logp_old: Tensor | None,
    guidance: float,
    clip_range: float,
    beta: float,
    scale: float,
    ratio: ops.Ratio = "density",
) -> ops.PolicyLoss:
    """`scale * sum over rows (weight surrogate + beta KL)` and statistics per row.

    `scale` is 1 / (rows of the whole optimiser step), so that micro-batches of any size add up to
    the mean over all of them. `logp_old` is the ratio's old log-density; None is that of these very
    velocities, so that the ratio is 1.
    """
    loss, stats = ops.policy_loss(
        rows.x,
        v,
        rows.x_next,
        rows.coef,
        logp_old,
        rows.advantage,
        v_uncond=v_uncond,
        guidance=guidance,
        v_ref=v_ref,
        clip_range=clip_range,
        kl_weight=beta,
        # The op weighs a row's surrogate and KL alike; the KL is to keep its own scale.
        kl_scale=rows.kl_scale / rows.weight,
        weights=rows.weight * scale,
        ratio=ratio,
    )
    return ops.PolicyLoss(loss, stats._replace(kl=stats.kl * rows.weight))


def log_density(rows: Rows, v: Tensor, v_uncond: Tensor | None, *, guidance: float) -> Tensor:
    """fp32 `[R]`: the log-density of the rows' transitions under these velocities."""
    return ops.sde_logprob(rows.x, v, rows.x_next, rows.coef, v_uncond=v_uncond, guidance=guidance)
