"""Clean estimates: every state that is to be scored is carried on to t = 0 by its solver.

The states of one step are one run of a solver, and many runs advance together: the velocities that
they ask for in one round share the batches, whose rows so stand at different noise levels, and at
different stages of different solvers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.rollout import States, Trajectories, Unfinished, VelocityField, batches
from sfgrpo.solvers import SolverError, Stages


def _stages(part: Unfinished, x: Tensor, p: Tensor) -> Stages:
    """What is left of a solver for the states `x` of a step, `p` where the sampler has led them."""
    if part.behind is not None:
        p = ops.tweedie(x, (yield x, part.behind), part.method.first)
    return p if part.method.rest is None else (yield from part.method.rest(x, p))


class _Run:
    """States of one step on their way to t = 0."""

    def __init__(self, made: Trajectories, part: Unfinished, rows: slice) -> None:
        states = made.states
        self.estimate, self.prompt = states.x_U[rows], states.prompt_U[rows]
        x = made.latents_MS[states.member_U[rows], part.step]
        self.stages = _stages(part, x, self.estimate)
        self.latents, self.level = self.estimate, 0.0

    def advance(self, v: Tensor | None) -> bool:
        """Go on with the velocity that was asked for (None at first) to the next that is asked
        for; False at the end, when the estimate is in its place."""
        try:
            asked = self.stages.send(v)  # pyright: ignore[reportArgumentType]
        except StopIteration as end:
            self.estimate.copy_(self._like_estimate("returned", end.value))
            return False
        if not (isinstance(asked, tuple) and len(asked) == 2):
            raise SolverError(
                f"a solver yielded a {type(asked).__name__}, expected (latents, noise level)"
            )
        latents, self.level = asked
        self.latents = self._like_estimate("asked for the velocity of", latents)
        return True

    def _like_estimate(self, did: str, found: object) -> Tensor:
        if not isinstance(found, Tensor):
            raise SolverError(f"a solver {did} a {type(found).__name__}, expected latents")
        if found.shape != self.estimate.shape:
            raise SolverError(
                f"a solver {did} latents of shape {tuple(found.shape)}, expected "
                f"{tuple(self.estimate.shape)}"
            )
        return found


def _together(states: States, members: int, size: int) -> Iterator[list[tuple[Unfinished, slice]]]:
    """Which rows advance together.

    A full batch of trajectories at one step goes alone: all its rounds are full batches, and no
    more than one batch of latents is held beside what sampling left. What fills no batch goes
    together at last. All ranks have as many trajectories, so they divide them in the same way; of
    shared states they have different numbers, so those go with the last.
    """
    last = []
    for part in states.unfinished:
        if part.method.rest is None and part.behind is None:
            continue
        if part.shared:
            last.append((part, part.rows))
            continue
        for rows in batches(members, size):
            piece = slice(part.rows.start + rows.start, part.rows.start + rows.stop)
            if rows.stop - rows.start == size:
                yield [(part, piece)]
            else:
                last.append((part, piece))
    if last:
        yield last


def _carry(
    field: VelocityField, made: Trajectories, pieces: Sequence[tuple[Unfinished, slice]]
) -> None:
    """Lead some of the states to t = 0 together."""
    runs = [_Run(made, part, rows) for part, rows in pieces]
    runs = [run for run in runs if run.advance(None)]
    while runs:
        t = torch.cat([run.latents.new_full((len(run.latents),), run.level) for run in runs])
        x = torch.cat([run.latents for run in runs])
        v = field.guided_in_batches(x, t, torch.cat([run.prompt for run in runs]))
        answers = v.split([len(run.latents) for run in runs])
        runs = [run for run, v in zip(runs, answers, strict=True) if run.advance(v)]


@torch.no_grad()
def as_finished(field: VelocityField, made: Trajectories) -> Iterator[Tensor]:
    """Carry the unfinished states on to t = 0, some at a time, in `States.x_U`.

    Yields:
        bool `[U]`, which of them are clean estimates by now: at first those that need nothing, at
        last all. All ranks hear as often.
    """
    groups = list(_together(made.states, len(made.latents_MS), field.batch_size))
    finished_U = torch.ones(len(made.states.x_U), dtype=torch.bool)
    for _, rows in (piece for pieces in groups for piece in pieces):
        finished_U[rows] = False
    yield finished_U
    for pieces in groups:
        _carry(field, made, pieces)
        for _, rows in pieces:
            finished_U[rows] = True
        yield finished_U
