"""Prompts -> trajectories -> the clean estimate of every state.

Shapes: G groups (prompts) and M trajectories of this rank, T steps, S = T + 1 states (0 is x_T,
the pure noise; T is the final latent), U distinct states, B rows of one forward.

All trajectories of a group start from the same noise, and steps without noise keep them together:
such states are computed, estimated and scored once per group. Every other state of every
trajectory goes through the network in full batches whose rows stand at different noise levels.

Randomness depends on (seed, sample id, step, element) alone, never on batch size, rank or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfgrpo import ops
from sfgrpo.backbones.base import Backbone, Conditioning

START = 2**32 - 1
"""The step id under which a group's starting noise is drawn; no schedule has so many steps."""


@dataclass(frozen=True, kw_only=True)
class VelocityField:
    """The guided velocity of a network for rows that name their prompt.

    `network` is the bare transformer or the training engine that wraps it.
    """

    backbone: Backbone
    network: nn.Module
    conditioning: Conditioning
    unconditional: Conditioning | None
    """One row, for all prompts; None without guidance."""
    guidance: float
    """Scale of classifier-free guidance; 1 is none."""

    batch_size: int
    """Rows of one forward (twice as many go through the network under guidance)."""
    pace: Callable[[int], int] | None = None
    """From this rank's number of batches to that of the rank that has most, where a forward waits
    for all ranks; None where it does not."""

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity at `x [B, ...]`, `t [B]`, prompts `[B]`.

        With guidance both come from one forward of 2 B rows. The second is None without guidance,
        and where the backbone has combined them by a formula of its own.
        """
        rows = self.conditioning.rows(prompt)
        if self.unconditional is None:
            return self.backbone.velocity(self.network, x, t, rows), None
        both = Conditioning.cat([rows, self.unconditional.rows(torch.zeros_like(prompt))])
        v = self.backbone.velocity(self.network, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = v.chunk(2)
        return self.backbone.guide(conditional, unconditional, self.guidance)

    def guided(self, v: Tensor, v_uncond: Tensor | None) -> Tensor:
        """`v_u + w (v_c - v_u)`."""
        return v if v_uncond is None else torch.lerp(v_uncond, v, self.guidance)

    def batched(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for any number of rows, `batch_size` at a time."""
        spare = self.spare_batches(len(x))
        parts = [self(x[r], t[r], prompt[r]) for r in batches(len(x), self.batch_size)]
        self.keep_pace(x, t, prompt, forwards=spare)
        unconditional = [u for _, u in parts if u is not None]
        return torch.cat([v for v, _ in parts]), torch.cat(unconditional) if unconditional else None

    def spare_batches(self, rows: int) -> int:
        """How many batches fewer than the rank with most it takes for so many rows; asked before
        the first of them, or ranks would wait for each other's answers and forwards crosswise."""
        here = -(-rows // self.batch_size)
        return self.pace(here) - here if self.pace else 0

    def keep_pace(self, x: Tensor, t: Tensor, prompt: Tensor, *, forwards: int) -> None:
        """Join so many forwards of ranks that have more; what they compute is thrown away."""
        for _ in range(forwards):
            self(x[:1], t[:1], prompt[:1])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which trajectories this rank samples, and how they are numbered for the noise."""

    group_G: Tensor
    """int64 `[G]`: the noise id of each group's starting point."""
    prompt_G: Tensor
    """int64 `[G]`: each group's row in the conditioning."""
    group_of_M: Tensor
    """int64 `[M]`: which group (0 .. G-1) a trajectory belongs to."""
    sample_M: Tensor
    """int64 `[M]`: the noise id of each trajectory."""


@dataclass(frozen=True, kw_only=True)
class States:
    """The distinct states of a set of trajectories."""

    x_U: Tensor
    """`[U, ...]` latents; where an ODE substep was already taken, the latent after it."""
    t_U: Tensor
    """`[U]` noise level at which the ODE continues; 0 for final latents."""
    dt_U: Tensor
    """`[U]` length of one ODE substep."""
    prompt_U: Tensor
    """int64 `[U]` row of the conditioning."""
    where_MS: Tensor
    """int64 `[M, T + 1]` (or `[M, 1]`, final states alone): the row of each state in the others."""
    unfinished: int
    """Rows before this one stand above t = 0; the final latents follow them."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What sampling leaves behind; everything on the sampling device."""

    latents_MS: Tensor
    """`[M, T + 1, ...]` the stored states: densities are taken on exactly these values."""
    logp_MT: Tensor
    """fp32 `[M, T]` log-density of each step (mean over elements); 0 on noise-free steps."""
    states: States


def batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Collector:
    """Gathers distinct states and remembers which trajectory stands where."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.where: list[Tensor] = []
        self.count = 0
        self.unfinished = 0

    def add(self, x: Tensor, t: float, dt: float, prompt: Tensor, row_of_M: Tensor) -> None:
        self.rows.append((x, x.new_full((len(x),), t), x.new_full((len(x),), dt), prompt))
        self.where.append(row_of_M + self.count)
        self.count += len(x)
        self.unfinished += len(x) if dt > 0 else 0

    def states(self) -> States:
        x, t, dt, prompt = (torch.cat(column) for column in zip(*self.rows, strict=True))
        return States(
            x_U=x,
            t_U=t,
            dt_U=dt,
            prompt_U=prompt,
            where_MS=torch.stack(self.where, dim=1),
            unfinished=self.unfinished,
        )


@torch.no_grad()
def sample(
    field: VelocityField,
    table: Tensor,
    plan: Plan,
    *,
    seed: int,
    latent_shape: tuple[int, ...],
    substeps: int | None,
) -> Trajectories:
    """Run the sampler of `table` for every trajectory of `plan`.

    Args:
        table: `[T, 4]` coefficients on the CPU (`sfgrpo.sde.coefficients`).
        latent_shape: shape of one latent.
        substeps: T', the number of ODE substeps of a clean estimate; None keeps no intermediate
            state for estimation, the final latents alone.

    Returns:
        Trajectories, the first substep of every estimate already taken with the sampler's own
        velocity: the step's kernel projects by `t / T'` instead of `t` in the same pass.
    """
    device, noisy = plan.sample_M.device, [n > 0 for n in table[:, 2].tolist()]
    times = table[:, 3].tolist()
    steps = table.clone()
    steps[:, 3] /= substeps or 1
    members = torch.arange(len(plan.sample_M), device=device)
    first_of_G = torch.full_like(plan.group_G, len(members)).scatter_reduce(
        0, plan.group_of_M, members, "amin"
    )
    x = ops.philox_normal(latent_shape, seed=seed, sample_ids=plan.group_G, step_ids=START)
    prompt, ids, row_of_M, together = plan.prompt_G, plan.group_G, plan.group_of_M, True
    latents, logps, collector = [x[row_of_M]], [], _Collector()
    for k, coef in enumerate(steps.to(device)):
        v, v_uncond = field.batched(x, x.new_full((len(x),), times[k]), prompt)
        scored, scored_row_of_M, scored_prompt = slice(None), row_of_M, prompt
        if together and noisy[k]:  # noise parts the group here; the state before it is still shared
            x, v, prompt = (tensor[plan.group_of_M] for tensor in (x, v, prompt))
            v_uncond = None if v_uncond is None else v_uncond[plan.group_of_M]
            ids, row_of_M, together, scored = plan.sample_M, members, False, first_of_G
        x_next, logp, estimate = ops.sde_step_x0(
            x, v, coef.expand(len(x), 4), seed=seed, sample_ids=ids, step_ids=k,
            v_uncond=v_uncond, guidance=field.guidance,
        )  # fmt: skip
        if substeps is not None:
            dt = times[k] / substeps
            collector.add(estimate[scored], times[k] - dt, dt, scored_prompt, scored_row_of_M)
        x = x_next
        latents.append(x[row_of_M])
        logps.append(logp[row_of_M])
    collector.add(x, 0.0, 0.0, prompt, row_of_M)
    return Trajectories(
        latents_MS=torch.stack(latents, 1),
        logp_MT=torch.stack(logps, 1),
        states=collector.states(),
    )


@torch.no_grad()
def clean_estimates(
    field: VelocityField, states: States, *, substeps: int
) -> Iterator[tuple[slice, Tensor]]:
    """Carry every state on to t = 0 by the remaining Euler substeps of the ODE.

    States of all steps and trajectories share the batches; rows differ in noise level.

    Yields:
        `(rows, latents [B, ...])` covering the U states in order, so that decoding and scoring
        can follow batch by batch and no more than one batch of images is held.
    """
    spare = field.spare_batches(states.unfinished) if substeps > 1 else 0
    for rows in batches(len(states.x_U), field.batch_size):
        x, t, dt, prompt = (y[rows] for y in (states.x_U, states.t_U, states.dt_U, states.prompt_U))
        unfinished = max(0, min(states.unfinished - rows.start, len(x)))
        if unfinished:
            estimate, t, dt, prompt = (y[:unfinished] for y in (x, t, dt, prompt))
            for _ in range(substeps - 1):
                v = field.guided(*field(estimate, t, prompt))
                estimate = ops.tweedie(estimate, v, dt)
                t = t - dt
            x = torch.cat([estimate, x[unfinished:]])
        yield rows, x
    field.keep_pace(states.x_U, states.t_U, states.prompt_U, forwards=spare * (substeps - 1))
