"""Flow-GRPO's function: the formulas of its paper and code, its random numbers, its gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfgrpo import sde
from sfgrpo.ops import sde_step_with_logprob
from tests.support.ops.cases import BF16, F32, F64

ETA = 0.7


def _scheduler(steps: int = 10, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def _published(
    scheduler: Any, v: Tensor, timestep: Tensor, x: Tensor, x_next: Tensor | None, noise: Tensor
) -> tuple[Tensor, ...]:
    """The SDE step in the operations of Flow-GRPO's code, at the precision of its inputs."""
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    shape = (-1, *(1,) * (x.ndim - 1))
    sigmas = scheduler.sigmas.to(x.dtype)
    sigma, sigma_next = sigmas[index].view(shape), sigmas[index + 1].view(shape)
    dt = sigma_next - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * ETA
    mean = x * (1 + std**2 / (2 * sigma) * dt)
    mean = mean + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    n = std * torch.sqrt(-dt)
    stored = mean + n * noise if x_next is None else x_next
    square = (stored.detach() - mean) ** 2
    each = -square / (2 * n**2) - torch.log(n) - math.log(math.sqrt(2 * math.pi))
    return stored, each.mean(dim=tuple(range(1, x.ndim))), mean, std


def _operands(dtype: torch.dtype = F32) -> tuple[Any, Tensor, Tensor, Tensor]:
    scheduler: Any = _scheduler()
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, 3, 8, 8, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    return scheduler, v, scheduler.timesteps[[0, 3, 8, 9]], x


def test_samples_what_the_original_samples() -> None:
    scheduler, v, timestep, x = _operands()
    torch.manual_seed(5)
    noise = randn_tensor(v.shape, dtype=F32)
    torch.manual_seed(5)
    got = sde_step_with_logprob(scheduler, v, timestep, x, ETA)
    exact = _published(scheduler, v.double(), timestep, x.double(), None, noise.double())
    for name, one, other in zip(("prev", "logp", "mean", "std"), got, exact, strict=True):
        assert one.dtype == F32, name
        assert one.shape == other.shape, name
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("several", [False, True])
def test_generators(several: bool) -> None:
    scheduler, v, timestep, x = _operands()

    def sources() -> Any:
        made = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return made if several else made[0]

    noise = randn_tensor(v.shape, generator=sources(), dtype=F32)
    got, *_ = sde_step_with_logprob(scheduler, v, timestep, x, ETA, generator=sources())
    expected, *_ = _published(scheduler, v, timestep, x, None, noise)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("given", [False, True])
def test_every_gradient_of_the_original(given: bool) -> None:
    scheduler, v, timestep, x = _operands()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    stored = _published(scheduler, v, timestep, x, None, noise)[0] if given else None
    weights = [torch.randn(s, generator=torch.Generator().manual_seed(7)) for s in (x.shape, (4,))]

    def gradients(fused: bool) -> tuple[Tensor, ...]:
        leaves = [v.clone().requires_grad_(), x.clone().requires_grad_()]
        if fused:
            torch.manual_seed(3)
            source = None if given else torch.Generator().manual_seed(3)
            prev, logp, mean, _ = sde_step_with_logprob(
                scheduler, leaves[0], timestep, leaves[1], ETA, stored, source
            )
        else:
            prev, logp, mean, _ = _published(
                scheduler, leaves[0], timestep, leaves[1], stored, noise
            )
        loss = (weights[1] * logp).sum() + (weights[0] * (mean + (0 if given else prev))).sum()
        return torch.autograd.grad(loss, leaves)

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_half_precision_is_upcast() -> None:
    scheduler, v, timestep, x = _operands(BF16)
    stored = (x.float() * 0.99).to(BF16)
    got = sde_step_with_logprob(scheduler, v, timestep, x, ETA, prev_sample=stored)
    exact = _published(scheduler, v.double(), timestep, x.double(), stored.double(), x.double())
    assert [t.dtype for t in got] == [F32] * 4
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)


def test_agrees_with_our_own_flow_sde() -> None:
    scheduler, v, _, x = _operands()
    table = sde.coefficients(scheduler.sigmas, "flow", ETA)
    _, _, mean, std = sde_step_with_logprob(scheduler, v, scheduler.timesteps[:4], x, ETA, x)
    a, b, n, _ = table[:4].reshape(4, 4, 1, 1, 1).unbind(1)
    torch.testing.assert_close(mean, a * x + b * v, rtol=1e-5, atol=1e-5)
    dt = (scheduler.sigmas[:4] - scheduler.sigmas[1:5]).reshape(4, 1, 1, 1)
    torch.testing.assert_close(std * dt.sqrt(), n, rtol=1e-5, atol=1e-6)


def test_one_timestep_for_all_rows_and_no_noise() -> None:
    scheduler, v, _, x = _operands()
    prev, logp, mean, _ = sde_step_with_logprob(scheduler, v, scheduler.timesteps[3], x, 0.0)
    assert torch.equal(prev, mean)
    assert logp.tolist() == [0.0] * 4


def test_of_a_timestep_that_occurs_twice_the_second_counts() -> None:
    schedule: Any = SimpleNamespace(
        timesteps=torch.tensor([900.0, 500.0, 500.0, 100.0]),
        sigmas=torch.tensor([0.9, 0.5, 0.4, 0.1, 0.0]),
    )
    *_, std = sde_step_with_logprob(
        schedule, torch.ones(1, 2), torch.tensor([500.0]), torch.ones(1, 2), 1.0
    )
    assert float(std) == pytest.approx(math.sqrt(0.4 / 0.6))


def test_clear_errors() -> None:
    scheduler, v, timestep, x = _operands()
    with pytest.raises(ValueError, match="timestep: got 123, expected one of scheduler"):
        sde_step_with_logprob(scheduler, v, torch.full((4,), 123.0), x)
    with pytest.raises(ValueError, match="sde_type: got 'sde_dpm', expected 'sde' or 'cps'"):
        sde_step_with_logprob(scheduler, v, timestep, x, sde_type="sde_dpm")
    with pytest.raises(ValueError, match=r"timestep: got shape \(2,\), expected \[1\] or \(4,\)"):
        sde_step_with_logprob(scheduler, v, timestep[:2], x)
    with pytest.raises(ValueError, match=r"noise_level: got \[-0.5\], expected finite numbers"):
        sde_step_with_logprob(scheduler, v, timestep, x, torch.tensor([-0.5]))
    with pytest.raises(ValueError, match="generator: got 3 of them, expected 1 or 4"):
        sde_step_with_logprob(scheduler, v, timestep, x, ETA, None, [torch.Generator()] * 3)
    with pytest.raises(ValueError, match=r"model_output: got shape .* like sample"):
        sde_step_with_logprob(scheduler, v[:2], timestep, x)


def _published_cps(
    scheduler: Any, v: Tensor, timestep: Tensor, x: Tensor, x_next: Tensor | None, noise: Tensor
) -> tuple[Tensor, ...]:
    """Flow-CPS's step and its score without constants, in the terms of its paper."""
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    sigmas = scheduler.sigmas.to(x.dtype)
    sigma, sigma_next = (sigmas[i].view(-1, 1, 1, 1) for i in (index, index + 1))
    std = sigma_next * math.sin(ETA * math.pi / 2)
    clean, predicted = x - sigma * v, x + v * (1 - sigma)
    mean = clean * (1 - sigma_next) + predicted * torch.sqrt(sigma_next**2 - std**2)
    stored = mean + std * noise if x_next is None else x_next
    logp = -((stored.detach() - mean) ** 2).mean((1, 2, 3))
    return stored, logp, mean, std, torch.sqrt(sigma - sigma_next)


def test_cps_is_scored_without_its_constants() -> None:
    scheduler, v, timestep, x = _operands()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    options: Any = {"sde_type": "cps", "return_sqrt_dt": True}
    source = torch.Generator().manual_seed(3)
    got = sde_step_with_logprob(scheduler, v, timestep, x, ETA, generator=source, **options)
    wide = (scheduler, v.double(), timestep, x.double())
    for one, other in zip(got, _published_cps(*wide, None, noise.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    stored = got[0] + 0.1
    again = sde_step_with_logprob(scheduler, v, timestep, x, ETA, stored, **options)
    exact = _published_cps(*wide, stored.double(), noise)
    noisy = exact[3].flatten() > 0  # the last step's log-density is 0 by rule
    assert noisy.tolist() == [True, True, True, False]
    torch.testing.assert_close(again[1][noisy].double(), exact[1][noisy], rtol=2e-6, atol=2e-7)
    assert float(again[1][3]) == 0.0


def test_cps_has_the_gradients_of_the_original() -> None:
    scheduler, v, timestep, x = _operands()
    timestep, stored = timestep.clone(), x * 0.9
    timestep[3] = scheduler.timesteps[5]
    weights = torch.randn(4, generator=torch.Generator().manual_seed(7))

    def gradients(step: Any, *last: Any, **options: Any) -> tuple[Tensor, ...]:
        leaves = [v.clone().requires_grad_(), x.clone().requires_grad_()]
        _, logp, mean, *_ = step(scheduler, leaves[0], timestep, leaves[1], *last, **options)
        return torch.autograd.grad((weights * logp).sum() + mean.square().sum(), leaves)

    fused = gradients(sde_step_with_logprob, ETA, stored, sde_type="cps")
    for one, other in zip(fused, gradients(_published_cps, stored, x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_sqrt_dt_is_a_fifth_result() -> None:
    scheduler, v, timestep, x = _operands()
    plain = sde_step_with_logprob(scheduler, v, timestep, x, ETA, x)
    *same, sqrt_dt = sde_step_with_logprob(scheduler, v, timestep, x, ETA, x, return_sqrt_dt=True)
    assert all(map(torch.equal, plain, same))
    index = [scheduler.index_for_timestep(t) for t in timestep]
    expected = torch.stack([(scheduler.sigmas[i] - scheduler.sigmas[i + 1]).sqrt() for i in index])
    torch.testing.assert_close(sqrt_dt, expected.reshape(4, 1, 1, 1))


@pytest.mark.parametrize("level", [torch.tensor(ETA), torch.full((4,), ETA, dtype=F64)])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_a_noise_level_may_be_a_tensor(level: Tensor, sde_type: str) -> None:
    scheduler, v, timestep, x = _operands()
    expected = sde_step_with_logprob(scheduler, v, timestep, x, ETA, x, sde_type=sde_type)
    got = sde_step_with_logprob(scheduler, v, timestep, x, level, x, sde_type=sde_type)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_one_timestep_has_one_deviation() -> None:
    scheduler, v, _, x = _operands()
    for timestep in (
        scheduler.timesteps[3],
        scheduler.timesteps[3:4],
        float(scheduler.timesteps[3]),
    ):
        *_, std, sqrt_dt = sde_step_with_logprob(
            scheduler, v, timestep, x, ETA, return_sqrt_dt=True
        )
        assert std.shape == sqrt_dt.shape == (1, 1, 1, 1)


def test_a_generator_beside_a_stored_state_is_not_used() -> None:
    scheduler, v, timestep, x = _operands()
    source = torch.Generator().manual_seed(1)
    before = source.get_state()
    got = sde_step_with_logprob(scheduler, v, timestep, x, ETA, x, source)
    assert torch.equal(source.get_state(), before)
    assert torch.equal(got[0], x)


@pytest.mark.parametrize("dtype", [BF16, torch.int64])
def test_a_timestep_that_rounding_made_ambiguous_is_an_error(dtype: torch.dtype) -> None:
    schedule: Any = SimpleNamespace(
        timesteps=torch.tensor([999.5, 999.25, 500.0]), sigmas=torch.tensor([0.9995, 0.9, 0.5, 0.0])
    )
    x = torch.ones(1, 2)
    named = sde_step_with_logprob(schedule, x, torch.tensor([500.0]), x, prev_sample=x)
    got = sde_step_with_logprob(schedule, x, torch.tensor([500.0]).to(dtype), x, prev_sample=x)
    assert all(map(torch.equal, named, got))
    with pytest.raises(ValueError, match=r"to which 2 entries of scheduler.timesteps round"):
        sde_step_with_logprob(schedule, x, schedule.timesteps[:1].to(dtype), x)
