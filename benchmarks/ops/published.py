"""The ops as published training code writes them, in eager PyTorch: what a benchmark compares to.

Transcribed from the formulas and the order of operations of Flow-GRPO's repository
(``sde_step_with_logprob``, its training loss and its per-prompt statistics; arXiv 2505.05470):
latents and velocities upcast to float32 first, coefficients as tensors that broadcast over the
latents, noise by ``torch.randn``, one PyTorch operation per arithmetic operation, gradients by
autograd (``table.py`` asks for them).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.ops.operands import Rewards, Transition


def _transition(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Flow-SDE's step."""
    dt = sigma_next - sigma
    std = torch.sqrt(sigma / (1 - sigma)) * eta
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * torch.sqrt(-1 * dt)


def _log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    log_prob = (
        -((x_next.detach() - mean) ** 2) / (2 * std**2)
        - torch.log(std)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi, device=mean.device)))
    )
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def sde_step(o: Transition) -> tuple[Tensor, Tensor]:
    x, v = o.x.float(), o.v.float()
    mean, std = _transition(x, v, o.sigma, o.sigma_next, o.eta)
    eps = torch.randn(v.shape, device=v.device, dtype=v.dtype) if o.noise is None else o.noise
    x_next = mean + std * eps
    return x_next, _log_prob(x_next, mean, std)


def sde_step_x0(o: Transition) -> tuple[Tensor, Tensor, Tensor]:
    return *sde_step(o), *tweedie(o)


def sde_logprob(o: Transition) -> tuple[Tensor]:
    mean, std = _transition(o.x.float(), o.v.float(), o.sigma, o.sigma_next, o.eta)
    return (_log_prob(o.x_next.float(), mean, std),)


def policy_loss(o: Transition) -> tuple[Tensor]:
    x = o.x.float()
    mean, std = _transition(x, o.v.float(), o.sigma, o.sigma_next, o.eta)
    with torch.no_grad():
        mean_ref, _ = _transition(x, o.v_ref.float(), o.sigma, o.sigma_next, o.eta)
    log_prob = _log_prob(o.x_next.float(), mean, std)
    advantages = torch.clamp(o.advantages, -5.0, 5.0)
    ratio = torch.exp(log_prob - o.logp_old)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - o.clip, 1.0 + o.clip)
    policy = torch.mean(torch.maximum(unclipped, clipped))
    kl = ((mean - mean_ref) ** 2).mean(dim=tuple(range(1, mean.ndim)), keepdim=True)
    return (policy + o.beta * torch.mean(kl / (2 * std**2)),)


def tweedie(o: Transition) -> tuple[Tensor]:
    return (o.x.float() - o.sigma * o.v.float(),)


def gain_advantages(o: Rewards) -> tuple[Tensor]:
    gains = o.rewards[:, :, 1:] - o.rewards[:, :, :-1]
    advantages = torch.empty_like(gains)
    for prompt in range(gains.shape[0]):
        group = gains[prompt]
        advantages[prompt] = (group - group.mean()) / group.std(correction=0)
    return (torch.clamp(advantages, -5.0, 5.0),)


def philox_normal(o: Transition) -> tuple[Tensor]:
    return (torch.randn(o.x.shape, device=o.x.device),)
