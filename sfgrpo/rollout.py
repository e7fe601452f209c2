"""Prompts -> trajectories, and the first stage of the clean estimates that are asked of them.

Shapes: G groups (prompts) and M trajectories of this rank, T steps, S = T + 1 states (0 is x_T,
the pure noise; T is the final latent), K states of a trajectory that are to be scored, U distinct
ones of them on this rank, B rows of one forward.

All trajectories of a group start from the same noise, and steps without noise keep them together:
such states are computed, estimated and scored once per group.

Randomness depends on (seed, sample id, step, element) alone, never on batch size, rank or device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfgrpo import ops
from sfgrpo.backbones.base import Backbone, Conditioning
from sfgrpo.solvers import Method
from sfgrpo.tally import Tally

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
    """One row for all prompts, or one for each where they bring images; None without guidance."""
    guidance: float
    """Scale of classifier-free guidance; 1 is none."""

    batch_size: int
    """Rows of one forward (twice as many go through the network under guidance)."""
    pace: Callable[[int], int] | None = None
    """From this rank's number of batches to that of the rank that has most, where a forward waits
    for all ranks; None where it does not."""
    pause: Callable[[], object] = lambda: None
    """Called before the batches of a step; like `pace` by all ranks as often."""
    context: int = 1
    """Neighbouring ranks that compute each row together, and so have the same rows."""
    tally: Tally = field(default_factory=Tally)
    """Counts the rows that go through a network; copies for another network share it."""

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Conditional and unconditional velocity at `x [B, ...]`, `t [B]`, prompts `[B]`.

        With guidance both come from one forward of 2 B rows. The second is None without guidance,
        and where the backbone has combined them by a formula of its own.
        """
        rows = self.conditioning.rows(prompt)
        branches = 1 if self.unconditional is None else 2
        self.tally.rows(branches * len(x), gradient=torch.is_grad_enabled())
        if self.unconditional is None:
            return self.backbone.velocity(self.network, x, t, rows), None
        of_each = len(self.unconditional) == len(self.conditioning)
        other = self.unconditional.rows(prompt if of_each else torch.zeros_like(prompt))
        both = Conditioning.cat([rows, other])
        v = self.backbone.velocity(self.network, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = v.chunk(2)
        return self.backbone.guide(conditional, unconditional, self.guidance)

    def guided(self, v: Tensor, v_uncond: Tensor | None) -> Tensor:
        """`v_u + w (v_c - v_u)`."""
        return v if v_uncond is None else torch.lerp(v_uncond, v, self.guidance)

    def batched(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for any number of rows, `batch_size` at a time."""
        parts = list(self._in_batches(x, t, prompt))
        unconditional = [u for _, u in parts if u is not None]
        return torch.cat([v for v, _ in parts]), torch.cat(unconditional) if unconditional else None

    def guided_in_batches(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """The guided velocity of any number of rows, `batch_size` at a time."""
        return torch.cat([self.guided(*part) for part in self._in_batches(x, t, prompt)])

    def _in_batches(
        self, x: Tensor, t: Tensor, prompt: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        self.pause()
        # Asked before the first batch, or ranks would wait for each other's answers and forwards
        # crosswise.
        here = -(-len(x) // self.batch_size)
        spare = self.pace(here) - here if self.pace else 0
        for rows in batches(len(x), self.batch_size):
            yield self(x[rows], t[rows], prompt[rows])
        for _ in range(spare):  # forwards of ranks that have more; what they compute is thrown away
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
class Unfinished:
    """The distinct states before one step, of which clean estimates are asked."""

    step: int
    method: Method
    behind: float | None
    """The noise level if the state lies behind the last step sampled: nobody has evaluated its
    velocity. None for the others, which `Method.first` has been followed from."""
    rows: slice
    """Which of the U."""
    shared: bool
    """One state for each group, not for each trajectory."""


@dataclass(frozen=True, kw_only=True)
class States:
    """The distinct states that are to be scored."""

    x_U: Tensor
    """`[U, ...]` the clean estimates: of unfinished states, where `Method.first` led (those behind
    the last step: the states), until `sfgrpo.estimates` has carried them on in place; the last
    state of each trajectory stands last."""
    prompt_U: Tensor
    """int64 `[U]` row of the conditioning."""
    member_U: Tensor
    """int64 `[U]` a trajectory that stands there."""
    where_MK: Tensor
    """int64 `[M, K]`: the row of each scored state in the others, the final state last."""
    unfinished: tuple[Unfinished, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What sampling leaves behind; everything on the sampling device."""

    latents_MS: Tensor
    """`[M, T + 1, ...]` the stored states, of the T steps sampled: densities are taken on exactly
    these values."""
    logp_MT: Tensor
    """fp32 `[M, T]` log-density of each step (mean over elements); 0 on noise-free steps."""
    states: States

    @property
    def spoilt_M(self) -> Tensor:
        """bool `[M]`: trajectories that do not end in numbers; no later step mends one."""
        return ~self.latents_MS[:, -1].flatten(1).isfinite().all(1)


def batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _states(
    plan: Plan, methods: Mapping[int, Method], *, apart: int, final: int, behind: float,
    latent: tuple[int, ...],
) -> States:  # fmt: skip
    """Room for the states that are to be scored; groups share those up to the state `apart`. The
    last one, `final`, stands at noise level `behind`."""
    members = torch.arange(len(plan.sample_M), device=plan.sample_M.device)
    first_of_G = torch.full_like(plan.group_G, len(members)).scatter_reduce(
        0, plan.group_of_M, members, "amin"
    )
    unfinished, member, where, count = [], [], [], 0
    for state in sorted({*methods, final}):
        shared = state <= apart
        rows = first_of_G if shared else members
        if state in methods:
            unfinished.append(
                Unfinished(
                    step=state, method=methods[state], rows=slice(count, count + len(rows)),
                    shared=shared, behind=behind if state == final else None,
                )
            )  # fmt: skip
        member.append(rows)
        where.append((plan.group_of_M if shared else members) + count)
        count += len(rows)
    member_U = torch.cat(member)
    return States(
        x_U=torch.empty(count, *latent, dtype=torch.float32, device=members.device),
        prompt_U=plan.prompt_G[plan.group_of_M[member_U]],
        member_U=member_U,
        where_MK=torch.stack(where, dim=1),
        unfinished=tuple(unfinished),
    )


@torch.no_grad()
def sample(
    field: VelocityField,
    table: Tensor,
    plan: Plan,
    *,
    seed: int,
    latent_shape: tuple[int, ...],
    methods: Mapping[int, Method],
    sampled: int | None = None,
) -> Trajectories:
    """Run the sampler of `table` for every trajectory of `plan`.

    Args:
        table: `[T, 4]` coefficients on the CPU (`sfgrpo.sde.coefficients`).
        latent_shape: shape of one latent.
        methods: how the clean estimate of the state before step k is taken, for each k (0 .. T-1)
            of which there shall be one. The last state is kept in any case.
        sampled: how many steps are taken; None is all. `methods` then says how the state behind
            them is carried on, whose clean estimate is the image.

    Returns:
        Trajectories, the first stage of every estimate already taken with the sampler's own
        velocity: the step's kernel projects by `Method.first` instead of `t` in the same pass.
    """
    device, M = plan.sample_M.device, len(plan.sample_M)
    times = [*table[:, 3].tolist(), 0.0]
    T = len(table) if sampled is None else sampled
    apart = next((k for k in range(T) if table[k, 2] > 0), T)
    states = _states(
        plan, methods, apart=apart, final=T, behind=times[T], latent=latent_shape
    )  # fmt: skip
    unfinished = {part.step: part for part in states.unfinished}
    steps = table[:T].clone()
    for k, part in unfinished.items():
        if part.behind is None:
            steps[k, 3] = part.method.first
    x = ops.philox_normal(latent_shape, seed=seed, sample_ids=plan.group_G, step_ids=START)
    prompt, ids, row_of_M = plan.prompt_G, plan.group_G, plan.group_of_M
    latents_MS, logp_MT = x.new_empty(M, T + 1, *latent_shape), x.new_empty(M, T)
    latents_MS[:, 0] = x[row_of_M]
    for k, coef in enumerate(steps.to(device)):
        v, v_uncond = field.batched(x, x.new_full((len(x),), times[k]), prompt)
        if k == apart:  # noise parts the group here; the state before it is still shared
            x, v, prompt = (tensor[plan.group_of_M] for tensor in (x, v, prompt))
            v_uncond = None if v_uncond is None else v_uncond[plan.group_of_M]
            ids, row_of_M = plan.sample_M, slice(None)
        step = ops.sde_step_x0 if k in unfinished else ops.sde_step
        x, logp, *estimate = step(
            x, v, coef.expand(len(x), 4), seed=seed, sample_ids=ids, step_ids=k,
            v_uncond=v_uncond, guidance=field.guidance,
        )  # fmt: skip
        latents_MS[:, k + 1], logp_MT[:, k] = x[row_of_M], logp[row_of_M]
        if k in unfinished:
            rows = unfinished[k].rows
            states.x_U[rows] = estimate[0][states.member_U[rows] if k == apart else slice(None)]
    states.x_U[-len(x) :] = x
    return Trajectories(latents_MS=latents_MS, logp_MT=logp_MT, states=states)
