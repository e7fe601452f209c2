"""Clean estimates: the solver's, whatever shares a batch; no forward more than is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sfgrpo import solvers
from sfgrpo.names import SOLVER
from sfgrpo.rollout import Plan, Trajectories, VelocityField
from sfgrpo.solvers import Method
from tests.support.rollouts import (
    GROUPS,
    SHAPE,
    SIZE,
    T,
    field,
    finished,
    forward_rows,
    levels,
    plan,
    run,
)

BY_LEVEL = {"third_order_above": 0.6, "midpoint_above": 0.4}
"""Of the toy's levels 1, .83, .67, .5, .33, .17: three of the third order, a midpoint, two of
Tweedie: seven evaluations a trajectory."""
Calls = list[tuple[int, int]]


def by_level(velocity: VelocityField, which: Plan | None = None, kind: str = "ddim", **options):
    return run(velocity, kind, which, solver="by_level", **BY_LEVEL, **options)


def alone(velocity: VelocityField, made: Trajectories, state: int, method: Method) -> torch.Tensor:
    """The estimate of one state of every trajectory, by the method and nothing else."""
    prompt, t = torch.arange(GROUPS).repeat_interleave(SIZE), levels(velocity)[state]

    def v(x: torch.Tensor, level: float) -> torch.Tensor:
        return velocity.guided(*velocity(x, x.new_full((len(x),), level), prompt))

    x = made.latents_MS[:, state]
    estimate = x - method.first * v(x, t)
    if method.rest is None:
        return estimate
    stages, answer = method.rest(x, estimate), None
    while True:
        try:
            answer = v(*stages.send(answer))  # pyright: ignore[reportArgumentType]
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [4, 5, 12, 64])
def test_the_estimate_is_the_solvers(guidance: float, batch_size: int) -> None:
    """Rows at other levels and stages, of other solvers, in a batch change nothing."""
    velocity = field(bend=0.4, guidance=guidance, batch_size=batch_size)
    made = by_level(velocity)
    found = finished(velocity, made)
    for state in range(T):
        method = solvers.by_level(levels(velocity)[state], **BY_LEVEL)
        expected = alone(velocity, made, state, method)
        torch.testing.assert_close(found[:, state], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, T], made.latents_MS[:, T])


@pytest.mark.parametrize("solver", ["tweedie", "midpoint", "by_level", "euler"])
@pytest.mark.parametrize("batch_size", [5, 12, 64])
def test_behind_the_last_step_the_solver_makes_the_image(solver: str, batch_size: int) -> None:
    """The steps that are taken are those of a whole run, and the last state's image is what the
    solver makes of it, its first velocity evaluated with the others."""
    velocity = field(bend=0.4, batch_size=batch_size)
    whole = run(velocity, states=())
    made = run(velocity, states=(2, 3, 4), solver=solver, sampled=4)
    assert torch.equal(made.latents_MS, whole.latents_MS[:, :5])
    assert torch.equal(made.logp_MT, whole.logp_MT[:, :4])
    before = sum(forward_rows(velocity))
    found = finished(velocity, made)
    extra = {"tweedie": 0, "midpoint": 1, "euler": 4}.get(solver)
    if extra is not None:
        rows = (3 * extra + 1) * GROUPS * SIZE
        assert sum(forward_rows(velocity)) - before == rows
    assert found.shape[1] == 3
    for k, state in enumerate((2, 3, 4)):
        (method,) = solvers.methods(solver, None, {state: levels(velocity)[state]}).values()
        expected = alone(velocity, made, state, method)
        torch.testing.assert_close(found[:, k], expected, rtol=1e-5, atol=1e-5)


def test_estimate_is_the_euler_ode_of_its_state() -> None:
    velocity = field(bend=0.4)
    made = run(velocity, substeps=5)
    found = finished(velocity, made)
    for state in range(T):
        x, t = made.latents_MS[:, state], levels(velocity)[state]
        for j in range(5):
            now = x.new_full((len(x),), t * (1 - j / 5))
            v, _ = velocity(x, now, torch.arange(GROUPS).repeat_interleave(SIZE))
            x = x - t / 5 * v
        torch.testing.assert_close(found[:, state], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "forwards"), [(12, 5), (6, 10), (4, 15), (60, 3)])
def test_evaluations_and_batches(batch_size: int, forwards: int) -> None:
    """States 1 to 4 alone: 2, 2, 1 and no evaluation of 12 trajectories, and state 1 is one for
    each group. Those go with what fills no batch, in two rounds."""
    velocity = field(bend=0.4, batch_size=batch_size)
    made = by_level(velocity, states=(1, 2, 3, 4))
    sampled = len(forward_rows(velocity))
    finished(velocity, made)
    rows = forward_rows(velocity)[sampled:]
    assert sum(rows) == 2 * GROUPS + (2 + 1) * GROUPS * SIZE
    if batch_size < 60:
        alone = 3 * GROUPS * SIZE // batch_size
        assert rows == [batch_size] * alone + [GROUPS] * 2
    else:
        assert rows == [GROUPS + 2 * GROUPS * SIZE, GROUPS + GROUPS * SIZE]


@pytest.mark.parametrize("solver", ["by_level", "third_order", "tweedie"])
def test_ranks_with_fewer_batches_keep_pace(solver: str) -> None:
    """Where a forward waits for all ranks, each makes as many as the one with most batches, and
    asks before it starts; what is sampled does not change."""
    shares = [plan(slice(0, 3)), plan(slice(3, 6))]  # one group here, parts of two there

    def paced(share: Plan, slowest: Iterator[int] | None) -> tuple[torch.Tensor, Calls]:
        """What is sampled, and at which forward how many batches were announced."""
        velocity, calls = field(batch_size=1), []

        def pace(count: int) -> int:
            calls.append((len(forward_rows(velocity)), count))
            return next(slowest) if slowest else count

        velocity = replace(velocity, pace=pace)
        found = finished(velocity, run(velocity, which=share, solver=solver))
        return found, [*calls, (len(forward_rows(velocity)), 0)]

    alone = [paced(share, None) for share in shares]
    assert alone[0][1] != alone[1][1]
    slowest = [max(one[1], two[1]) for one, two in zip(alone[0][1], alone[1][1], strict=True)]
    together = [paced(share, iter(slowest)) for share in shares]
    assert [at for at, _ in together[0][1]] == [at for at, _ in together[1][1]]
    for (expected, _), (found, _) in zip(alone, together, strict=True):
        assert torch.equal(found, expected)


def _flat(t: float) -> Method:
    def rest(x, p):
        v = yield p.flatten(1), t / 2
        return x - t * v

    return Method(t / 2, rest)


def _one(t: float) -> Method:
    def rest(x, p):
        v = yield p, t / 2
        return (x - t * v)[:1]

    return Method(t / 2, rest)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (_flat, r"asked for the velocity of latents of shape \(12, 48\), expected \(12, 3, 4, 4\)"),
        (_one, r"returned latents of shape \(1, 3, 4, 4\), expected \(12, 3, 4, 4\)"),
    ],
)
def test_a_solver_with_other_shapes_is_told(
    own, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVER.registered, "own", own)
    velocity = field()
    with pytest.raises(ValueError, match=message):
        finished(velocity, run(velocity, states=(3,), solver="own"))


def test_a_solver_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may overwrite what it is given, and that of one step alone is no other's."""

    def careless(t: float) -> Method:
        def rest(x, p):
            v = yield p.clone(), t / 2
            p.zero_()
            return x.sub_(t * v)

        return Method(t / 2, rest)

    monkeypatch.setitem(SOLVER.registered, "careless", careless)
    velocity = field(bend=0.4)
    found, expected = (
        finished(velocity, run(velocity, solver=s)) for s in ("careless", "midpoint")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape == (GROUPS * SIZE, T + 1, *SHAPE)
