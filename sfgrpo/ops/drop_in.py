"""The function that Flow-GRPO-family training code calls, served by the fused ops.

One changed import line is the migration::

    from sfgrpo.ops import sde_step_with_logprob

Signature, return values and random numbers are those of Flow-GRPO's repository (Liu et al.,
arXiv 2505.05470, Flow-SDE): the same ``torch.manual_seed`` or generator gives the same samples, and
all results agree to float32 rounding.  Differences, all of them where the original fails: a step
without noise (``noise_level=0``) has log-density 0 instead of nan, and the schedule is looked up on
its device, so no timestep is read back to the host.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops.sde_logprob import sde_logprob
from sfgrpo.ops.sde_step import StepOperands


class FlowScheduler(Protocol):
    """What is read of a scheduler: diffusers' FlowMatchEulerDiscreteScheduler has it."""

    timesteps: Tensor
    """``[T]``."""
    sigmas: Tensor
    """``[T + 1]``, ending in 0."""


def sde_step_with_logprob(
    scheduler: FlowScheduler,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Flow-SDE step from ``timestep`` to the next, or the score of the step that was taken.

    Differentiable in ``model_output`` and ``sample``, like the original.

    Args:
        scheduler: has ``timesteps [T]`` and ``sigmas [T + 1]``, e.g. a diffusers flow scheduler
            after ``set_timesteps``.
        model_output: velocity ``[B, ...]``, float32, bfloat16 or float16.
        timestep: ``[B]`` (or one for all rows), values out of ``scheduler.timesteps``.
        sample: latents ``[B, ...]``.
        noise_level: eta of the SDE.
        prev_sample: the stored next state to score; sampled where None.
        generator: of the noise; one, or one per row.

    Returns:
        ``(prev_sample, log_prob, prev_sample_mean, std_dev_t)``: float32 ``[B, ...]``, ``[B]``
        (mean per element), ``[B, ...]`` and ``[B, 1, ...]``, the diffusion before the factor
        sqrt(dt).

    Raises:
        TypeError, ValueError: as ``sde_step``; both ``prev_sample`` and ``generator``; on the CPU
            also a timestep that is not in the schedule (elsewhere its rows become nan).
    """
    _checks.latents("sample", sample)
    _checks.like("model_output", model_output, sample, "sample")
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: got one beside prev_sample, which leaves nothing to draw")
    x = sample if sample.dtype == torch.float64 else sample.float()
    coef, std = _coefficients(scheduler, timestep, x, _checks.number("noise_level", noise_level, 0))
    differentiable = torch.is_grad_enabled() and (model_output.requires_grad or x.requires_grad)
    if prev_sample is None:
        noise = _randn(x, generator)
        with torch.no_grad():
            o = StepOperands(x, model_output, coef, noise=noise, with_mean=not differentiable)
            stored, log_prob, _, mean = torch.ops.sfgrpo.sde_step(*o)
        if not differentiable:
            return stored, log_prob, mean, std
    else:
        stored = prev_sample.to(x.dtype)
    log_prob, mean = sde_logprob(x, model_output, stored.detach(), coef, return_mean=True)
    if prev_sample is None:  # as in the original, the sample itself carries its mean's gradient
        stored = mean + (stored - mean.detach())
    return stored, log_prob, mean, std


def _coefficients(
    scheduler: FlowScheduler, timestep: Tensor, x: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Rows (a, b, n, t) ``[B, 4]`` and ``std_dev_t [B, 1, ...]``, in the original's arithmetic."""
    device, dtype = x.device, _checks.row_dtype(x)
    times = torch.as_tensor(timestep, device=device).reshape(-1).expand(x.shape[0])
    schedule = torch.as_tensor(scheduler.timesteps, device=device)
    sigmas = torch.as_tensor(scheduler.sigmas, device=device).to(dtype)
    found = times.unsqueeze(1) == schedule.to(times.dtype).unsqueeze(0)
    if device.type == "cpu" and not bool(found.any(1).all()):
        wrong = float(times[~found.any(1)][0])
        raise ValueError(f"timestep: got {wrong:g}, expected one of scheduler.timesteps")
    # As diffusers' index_for_timestep: of a timestep that occurs twice, the second.
    order = found.long().cumsum(1)
    target = order[:, -1:].clamp(max=2)
    index = (found & (order == target)).long().argmax(1)
    known = torch.where(found.any(1), 1.0, torch.nan).to(dtype)
    sigma, sigma_next = sigmas[index] * known, sigmas[index + 1]
    dt = sigma_next - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * noise_level
    a = 1 + std**2 / (2 * sigma) * dt
    b = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    coef = torch.stack((a, b, std * torch.sqrt(-dt), sigma), dim=1)
    return coef, std.reshape(-1, *(1,) * (x.ndim - 1))


def _randn(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """The numbers diffusers' ``randn_tensor`` draws for these generators, on the device of x."""

    def draw(shape: torch.Size, source: torch.Generator | None) -> Tensor:
        where = x.device if source is None else source.device
        return torch.randn(shape, generator=source, device=where, dtype=x.dtype).to(x.device)

    if not isinstance(generator, list):
        return draw(x.shape, generator)
    if len(generator) == 1:
        return draw(x.shape, generator[0])
    if len(generator) != x.shape[0]:
        raise ValueError(f"generator: got {len(generator)} of them, expected 1 or {x.shape[0]}")
    return torch.cat([draw(x[:1].shape, one) for one in generator])
