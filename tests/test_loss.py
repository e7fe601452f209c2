"""Rows and the weighting of the loss; the op's own mathematics is tested in tests/ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sfgrpo import ops, sde
from sfgrpo.loss import Rows, TrajectoryRows, policy_loss

M, T, BETA, CLIP = 5, 10, 0.3, 0.2
SIGMAS = torch.linspace(1, 0, T + 1)
TABLE = sde.coefficients(SIGMAS, "ddim", 0.7)


def trajectories() -> TrajectoryRows:
    draw = torch.Generator().manual_seed(0)
    return TrajectoryRows(
        latents_MS=torch.randn(M, T + 1, 2, 3, 3, generator=draw),
        logp_MT=torch.randn(M, T, generator=draw),
        advantages_MT=torch.randn(M, T, generator=draw),
        prompt_M=torch.arange(M) % 2,
        schedule=sde.Schedule(
            table=TABLE,
            kl_scale_T=sde.kl_scale(TABLE, SIGMAS, "velocity"),
            weight_T=sde.step_weights(TABLE),
            sampled=T,
        ),
    )


def noisy_pairs() -> tuple[Tensor, Tensor]:
    steps = (TABLE[:, 2] > 0).nonzero().flatten()
    return torch.arange(M).repeat_interleave(len(steps)), steps.repeat(M)


def velocities(rows: Rows) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    v = torch.randn(rows.x.shape, generator=draw)
    return v.requires_grad_(), torch.randn(rows.x.shape, generator=draw)


def loss_of(rows: Rows, v: Tensor, v_ref: Tensor, scale: float) -> ops.PolicyLoss:
    return policy_loss(
        rows, v, None, v_ref, logp_old=rows.logp_sampling, guidance=1.0, clip_range=CLIP, beta=BETA,
        scale=scale,
    )  # fmt: skip


def test_rows_are_the_transitions_asked_for() -> None:
    source = trajectories()
    rows = source.take(torch.tensor([4, 0]), torch.tensor([2, 7]))
    assert torch.equal(rows.x[0], source.latents_MS[4, 2])
    assert torch.equal(rows.x_next[1], source.latents_MS[0, 8])
    assert torch.equal(rows.coef, TABLE[[2, 7]])
    assert rows.advantage.tolist() == [
        source.advantages_MT[4, 2].item(),
        source.advantages_MT[0, 7].item(),
    ]
    assert rows.prompt.tolist() == [0, 0]


def test_on_policy_gradient_is_the_weighted_policy_gradient_plus_kl() -> None:
    """At ratio 1: d loss / dv = mean(-A w dlogp/dv + beta dKL/dv), the KL without w. The ratio to
    the forward's own log-density is exactly 1, whatever the sampler thought."""
    rows = trajectories().take(*noisy_pairs())
    v, v_ref = velocities(rows)
    loss, stats = policy_loss(
        rows, v, None, v_ref, logp_old=None, guidance=1.0, clip_range=CLIP, beta=BETA,
        scale=1 / len(rows.x),
    )  # fmt: skip
    loss.backward()
    twin = v.detach().clone().requires_grad_()
    logp = ops.sde_logprob(rows.x, twin, rows.x_next, rows.coef)
    kl = (twin - v_ref).square().mean((1, 2, 3))
    (-rows.advantage * rows.weight * logp + BETA * kl).mean().backward()
    torch.testing.assert_close(v.grad, twin.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(stats.kl, kl.detach(), rtol=1e-5, atol=0)
    assert stats.ratio.tolist() == [1] * len(rows.x)
    assert not stats.clipped.any()


def test_the_own_log_density_takes_no_pass_of_its_own() -> None:
    rows = trajectories().take(*noisy_pairs())
    v, v_ref = velocities(rows)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        policy_loss(
            rows, v, None, v_ref, logp_old=None, guidance=1.0, clip_range=CLIP, beta=BETA, scale=1.0
        )
    ours = [event.name for event in run.events() or () if event.name.startswith("sfgrpo::")]
    assert ours == ["sfgrpo::policy_loss"]


@pytest.mark.parametrize("size", [1, 7, 39])
def test_micro_batches_add_up_to_the_whole(size: int) -> None:
    trajectory, step = noisy_pairs()
    rows = trajectories().take(trajectory, step)
    v, v_ref = velocities(rows)
    whole = loss_of(rows, v, v_ref, scale=1 / len(step)).loss
    (expected,) = torch.autograd.grad(whole, v)
    total = torch.zeros(())
    for start in range(0, len(step), size):
        part = slice(start, start + size)
        batch = trajectories().take(trajectory[part], step[part])
        total = total + loss_of(batch, v[part], v_ref[part], scale=1 / len(step)).loss
    (found,) = torch.autograd.grad(total, v)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
