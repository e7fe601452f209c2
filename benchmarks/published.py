"""The ops as published training code writes them, in eager PyTorch: what a benchmark compares to.

Transcribed from the formulas and the order of operations of Flow-GRPO's repository
(``sde_step_with_logprob``, its training loss and its per-prompt statistics; arXiv 2505.05470):
latents and velocities upcast to float32 first, coefficients as tensors that broadcast over the
latents, noise by ``torch.randn``, one PyTorch operation per arithmetic operation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


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


def sde_step(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor, Tensor]:
    x, v = o["x"].float(), o["v"].float()
    mean, std = _transition(x, v, o["sigma"], o["sigma_next"], o["eta"])
    eps = torch.randn(v.shape, device=v.device, dtype=v.dtype) if noise is None else noise
    x_next = mean + std * eps
    return x_next, _log_prob(x_next, mean, std)


def sde_logprob(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor, Tensor]:
    v = o["v"].detach().requires_grad_()
    mean, std = _transition(o["x"].float(), v.float(), o["sigma"], o["sigma_next"], o["eta"])
    log_prob = _log_prob(o["x_next"].float(), mean, std)
    (grad,) = torch.autograd.grad(log_prob.sum(), v)
    return log_prob.detach(), grad


def policy_loss(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor, Tensor]:
    v = o["v"].detach().requires_grad_()
    x, clip = o["x"].float(), o["clip"]
    mean, std = _transition(x, v.float(), o["sigma"], o["sigma_next"], o["eta"])
    with torch.no_grad():
        mean_ref, _ = _transition(x, o["v_ref"].float(), o["sigma"], o["sigma_next"], o["eta"])
    log_prob = _log_prob(o["x_next"].float(), mean, std)
    advantages = torch.clamp(o["advantages"], -5.0, 5.0)
    ratio = torch.exp(log_prob - o["logp_old"])
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    policy = torch.mean(torch.maximum(unclipped, clipped))
    kl = ((mean - mean_ref) ** 2).mean(dim=tuple(range(1, mean.ndim)), keepdim=True)
    loss = policy + o["beta"] * torch.mean(kl / (2 * std**2))
    (grad,) = torch.autograd.grad(loss, v)
    return loss.detach(), grad


def tweedie(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor]:
    return (o["x"].float() - o["sigma"] * o["v"].float(),)


def gain_advantages(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor]:
    rewards = o["rewards"]
    gains = rewards[:, :, 1:] - rewards[:, :, :-1]
    advantages = torch.empty_like(gains)
    for prompt in range(gains.shape[0]):
        group = gains[prompt]
        advantages[prompt] = (group - group.mean()) / group.std(correction=0)
    return (torch.clamp(advantages, -5.0, 5.0),)


def philox_normal(o: dict[str, Any], noise: Tensor | None) -> tuple[Tensor]:
    return (torch.randn(o["x"].shape, device=o["x"].device),)
