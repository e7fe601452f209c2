"""Rollouts of the generator with known velocities: three groups of four, six steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sfgrpo import sde, solvers
from sfgrpo.estimates import as_finished
from sfgrpo.rollout import Plan, Trajectories, VelocityField, sample
from tests.support.toy import PointBackbone, PointVelocity

T, GROUPS, SIZE = 6, 3, 4
CENTRES = ["-1", "0.5", "2"]
SHAPE = (3, 4, 4)


def field(bend: float = 0.0, *, guidance: float = 1.0, batch_size: int = 64) -> VelocityField:
    backbone = PointBackbone(bend)
    return VelocityField(
        backbone=backbone,
        network=backbone.transformer,
        conditioning=backbone.encode(CENTRES),
        unconditional=backbone.encode([""]) if guidance != 1 else None,
        guidance=guidance,
        batch_size=batch_size,
    )


def forward_rows(velocity: VelocityField) -> list[int]:
    """Rows of every forward so far."""
    assert isinstance(velocity.network, PointVelocity)
    return velocity.network.rows


def levels(velocity: VelocityField) -> list[float]:
    """Noise levels of the T + 1 states."""
    return velocity.backbone.sigmas(T, SHAPE).tolist()


def plan(trajectories: slice = slice(0, GROUPS * SIZE), offset: int = 0) -> Plan:
    index = torch.arange(GROUPS * SIZE)[trajectories]
    group, member = torch.unique_consecutive(index // SIZE, return_inverse=True)
    return Plan(
        group_G=group + offset, prompt_G=group, group_of_M=member, sample_M=index + offset * SIZE
    )


def run(
    velocity: VelocityField,
    kind: str = "ddim",
    which: Plan | None = None,
    *,
    states: Iterable[int] = range(T),
    solver: str = "euler",
    sampled: int | None = None,
    **options,
) -> Trajectories:
    """Trajectories with clean estimates of `states` by `solver` begun."""
    table = sde.coefficients(velocity.backbone.sigmas(T, SHAPE), kind, 0.7)
    at = levels(velocity)
    methods = solvers.methods(solver, options, {k: at[k] for k in states})
    return sample(
        velocity, table, which or plan(), seed=5, latent_shape=SHAPE, methods=methods,
        sampled=sampled,
    )  # fmt: skip


def finished(velocity: VelocityField, made: Trajectories) -> torch.Tensor:
    """`[M, K, ...]`: the clean estimates, the final latents last."""
    *_, finished_U = as_finished(velocity, made)
    assert finished_U.all()
    return made.states.x_U[made.states.where_MK]
