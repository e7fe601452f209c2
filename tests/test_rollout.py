"""Sampling: known answers, and independence of how the work is cut up."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import ops, sde
from sfgrpo.rollout import START
from tests.support.rollouts import (
    CENTRES,
    GROUPS,
    SHAPE,
    SIZE,
    T,
    field,
    finished,
    forward_rows,
    plan,
    run,
)


@pytest.mark.parametrize("kind", ["flow", "dance", "ddim", "cps", "renoise"])
def test_estimates_of_point_data_are_the_point(kind: str) -> None:
    """Where the flow lines are straight, every estimate and every final image is c itself."""
    velocity = field()
    estimates = finished(velocity, run(velocity, kind))
    expected = torch.tensor([float(c) for c in CENTRES]).repeat_interleave(SIZE)
    expected = expected.view(-1, 1, 1, 1, 1).expand_as(estimates)
    # Flow- and Dance-SDE add noise even in the step to t = 0, so their final images miss the point.
    states = slice(None, -1) if kind in ("flow", "dance") else slice(None)
    torch.testing.assert_close(estimates[:, states], expected[:, states], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "together"), [("ddim", 2), ("cps", 1), ("ode", T + 1)])
def test_shared_states_are_computed_once(kind: str, together: int) -> None:
    velocity = field(bend=0.4)
    made = run(velocity, kind)
    assert len(made.states.x_U) == GROUPS * together + GROUPS * SIZE * (T + 1 - together)
    steps = T if kind == "ode" else together
    assert forward_rows(velocity)[:steps] == [GROUPS] * steps
    by_group = made.latents_MS.unflatten(0, (GROUPS, SIZE))
    assert (by_group[:, :, :together] == by_group[:, :1, :together]).all()
    if together <= T:
        assert not (by_group[:, 1:, together:] == by_group[:, :1, together:]).any()


def test_start_is_the_groups_own_noise() -> None:
    made = run(field(), which=plan(offset=7))
    for group in range(GROUPS):
        noise = ops.philox_normal(
            SHAPE, seed=5, sample_ids=torch.tensor([7 + group]), step_ids=START
        )
        assert (made.latents_MS[group * SIZE, 0] == noise[0]).all()


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    whole, cut = field(bend=0.4), field(bend=0.4, batch_size=batch_size)
    first, second = run(whole), run(cut)
    assert (first.latents_MS == second.latents_MS).all()
    assert (first.logp_MT == second.logp_MT).all()
    assert (finished(whole, first) == finished(cut, second)).all()
    assert max(forward_rows(cut)) == batch_size


@pytest.mark.parametrize("cut", [4, 6, 5])
def test_layout_over_ranks_changes_nothing(cut: int) -> None:
    """Two ranks, with groups whole (4) or split between them (6, 5), sample what one rank does."""
    velocity = field(bend=0.4)
    whole = run(velocity)
    parts = [run(velocity, which=plan(share)) for share in (slice(0, cut), slice(cut, None))]
    assert (torch.cat([p.latents_MS for p in parts]) == whole.latents_MS).all()
    assert (torch.cat([p.logp_MT for p in parts]) == whole.logp_MT).all()
    estimates = torch.cat([finished(velocity, p) for p in parts])
    assert (estimates == finished(velocity, whole)).all()


def test_log_density_is_that_of_the_stored_states() -> None:
    velocity = field(bend=0.4)
    made = run(velocity)
    table = sde.coefficients(velocity.backbone.sigmas(T, SHAPE), "ddim", 0.7)
    prompt = torch.arange(GROUPS).repeat_interleave(SIZE)
    for k in range(T):
        x, coef = made.latents_MS[:, k], table[k].expand(GROUPS * SIZE, 4)
        v, _ = velocity(x, coef[:, 3], prompt)
        logp = ops.sde_logprob(x, v, made.latents_MS[:, k + 1], coef)
        torch.testing.assert_close(made.logp_MT[:, k], logp, rtol=1e-5, atol=1e-5)
    assert (made.logp_MT[:, 0] == 0).all()


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    """Point data: guidance w moves the point to w c, which the ODE then reaches exactly."""
    velocity = field(guidance=3.0)
    final = run(velocity, "ode", states=()).states.x_U.mean((1, 2, 3))
    torch.testing.assert_close(final, 3 * torch.tensor([-1, 0.5, 2]), rtol=0, atol=1e-4)
    estimates = finished(velocity, run(velocity))
    torch.testing.assert_close(
        estimates[:, 0].mean((1, 2, 3)).unique(), 3 * torch.tensor([-1, 0.5, 2]), rtol=0, atol=1e-4
    )


def test_without_estimates_only_final_states_are_kept() -> None:
    made = run(field(), states=())
    assert made.states.where_MK.shape == (GROUPS * SIZE, 1)
    assert len(made.states.x_U) == GROUPS * SIZE
    assert torch.equal(finished(field(), made)[:, 0], made.latents_MS[:, T])
