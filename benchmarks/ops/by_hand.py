"""The ops in eager PyTorch with as few passes over the latents as one gets without a kernel.

They are given our coefficient table, scale and add in one operation (``addcmul``), reduce with
``vector_norm``, which leaves no squares behind, and write gradients in closed form.  The forward
functions are also what ``torch.compile`` compiles; there, autograd derives the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.ops.operands import Rewards, Transition

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _columns(o: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, n), each ``[B, 1, ...]``."""
    a, b, n, _ = o.coef.reshape(-1, 4, *(1,) * (o.x.ndim - 1)).unbind(1)
    return a, b, n


def _mean_square(values: Tensor) -> Tensor:
    """``[B, ...] -> [B]``."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).square() / values[0].numel()


def _log_density(mean_square: Tensor, n: Tensor) -> Tensor:
    n = n.flatten()
    return -mean_square / (2 * n * n) - n.log() - HALF_LOG_2PI


def _residual(o: Transition) -> Tensor:
    a, b, _ = _columns(o)
    return torch.addcmul(torch.addcmul(o.x_next, o.x, -a), o.v.float(), -b)


def sde_step(o: Transition) -> tuple[Tensor, Tensor]:
    a, b, n = _columns(o)
    # x_next - mean is n eps by construction, so the density needs the noise alone.
    noise = torch.randn_like(o.x) if o.noise is None else o.noise
    x_next = torch.addcmul(torch.addcmul(a * o.x, o.v.float(), b), noise, n)
    return x_next, _log_density(_mean_square(noise) * n.flatten().square(), n)


def sde_step_x0(o: Transition) -> tuple[Tensor, Tensor, Tensor]:
    return *sde_step(o), *tweedie(o)


def sde_logprob(o: Transition) -> tuple[Tensor]:
    return (_log_density(_mean_square(_residual(o)), _columns(o)[2]),)


def sde_logprob_with_gradient(o: Transition) -> tuple[Tensor, Tensor]:
    _, b, n = _columns(o)
    residual = _residual(o)
    logp = _log_density(_mean_square(residual), n)
    return logp, residual.mul_(b / (n * n * o.x[0].numel())).to(o.v.dtype)


def _policy_rows(o: Transition, residual: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, A ratio where it is not clipped, b^2 / (2 n^2)) from x_next - mean and v - v_ref."""
    _, b, n = (column.flatten() for column in _columns(o))
    ratio = (_log_density(_mean_square(residual), n) - o.logp_old).exp()
    unclipped = o.advantages * ratio
    limited = o.advantages * ratio.clamp(1 - o.clip, 1 + o.clip)
    scale = b * b / (2 * n * n)
    loss = (o.beta * scale * _mean_square(delta) - torch.minimum(unclipped, limited)).mean()
    return loss, torch.where(limited < unclipped, 0.0, unclipped), scale


def policy_loss(o: Transition) -> tuple[Tensor]:
    return (_policy_rows(o, _residual(o), o.v.float() - o.v_ref.float())[0],)


def policy_loss_with_gradient(o: Transition) -> tuple[Tensor, Tensor]:
    _, b, n = _columns(o)
    residual, delta = _residual(o), o.v.float() - o.v_ref.float()
    loss, pull, scale = _policy_rows(o, residual, delta)
    g1 = -pull.reshape(b.shape) * b / (n * n * o.x.numel())
    g2 = 2 * o.beta * scale.reshape(b.shape) / o.x.numel()
    return loss, residual.mul_(g1).addcmul_(delta, g2).to(o.v.dtype)


def tweedie(o: Transition) -> tuple[Tensor]:
    return (torch.addcmul(o.x, o.v.float(), -o.sigma),)


def gain_advantages(o: Rewards) -> tuple[Tensor]:
    gains = o.rewards.diff(dim=2)
    variance, mean = torch.var_mean(gains, dim=(1, 2), correction=0, keepdim=True)
    return (((gains - mean) * variance.rsqrt()).clamp_(-5.0, 5.0),)
