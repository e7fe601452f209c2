"""The function that Flow-GRPO-family training code calls, served by the fused ops.

One changed import line is the migration::

    from sfgrpo.ops import sde_step_with_logprob

Signature, return values and random numbers are those of Flow-GRPO's repository (Liu et al.,
arXiv 2505.05470, Flow-SDE), of its function for SD3, FLUX and Qwen-Image: the same
``torch.manual_seed`` or generator gives the same samples, and all results agree to float32
rounding.  That repository's function of this name for Wan is another SDE, which is not served, nor
is ``sde_type="sde_dpm"``.  Differences, all of them where the original fails: a step without noise
(``noise_level=0``) has log-density 0 instead of nan, a timestep that rounding made ambiguous is an
error instead of another step, and the schedule is looked up on its device, so no timestep is read
back to the host.
"""

from __future__ import annotations

import math
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
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One stochastic step from ``timestep`` to the next, or the score of the step that was taken.

    Differentiable in ``model_output`` and ``sample``, like the original.

    Args:
        scheduler: has ``timesteps [T]`` and ``sigmas [T + 1]``, e.g. a diffusers flow scheduler
            after ``set_timesteps``.
        model_output: velocity ``[B, ...]``, float32, bfloat16 or float16.
        timestep: ``[B]`` (or one for all rows), values out of ``scheduler.timesteps``.
        sample: latents ``[B, ...]``.
        noise_level: eta of the SDE; a number, or a tensor with one or with ``[B]`` of them.
        prev_sample: the stored next state to score; sampled where None.
        generator: of the noise; one, or one per row; not used beside ``prev_sample``.
        sde_type: "sde" for Flow-SDE, "cps" for Flow-CPS (arXiv 2509.05952).
        return_sqrt_dt: also give the square root of the step's length, for GRPO-Guard.

    Returns:
        ``(prev_sample, log_prob, prev_sample_mean, std_dev_t)``: float32 ``[B, ...]``, ``[B]``
        (mean per element), ``[B, ...]`` and ``[B, 1, ...]``, or ``[1, 1, ...]`` for one timestep
        and noise level.  Of "sde", std_dev_t is the diffusion before the factor sqrt(dt), and
        log_prob the Gaussian's; of "cps", std_dev_t is the noise's deviation and log_prob
        ``-mean (prev_sample - prev_sample_mean)^2``, without the factor 1 / (2 std_dev_t^2) and
        the constants.  With ``return_sqrt_dt`` a fifth, ``sqrt(dt)`` in the shape of std_dev_t.

    Raises:
        TypeError, ValueError: as ``sde_step``; an unknown ``sde_type``; on the CPU also a timestep
            that is not in the schedule, or that several entries of the schedule round to in its
            dtype (elsewhere such rows become nan).
    """
    _checks.latents("sample", sample)
    _checks.like("model_output", model_output, sample, "sample")
    if sde_type not in _TRANSITIONS:
        known = " or ".join(map(repr, _TRANSITIONS))
        raise ValueError(f"sde_type: got {sde_type!r}, expected {known}")
    x = sample if sample.dtype == torch.float64 else sample.float()
    sigma, sigma_next, first = _sigmas(scheduler, timestep, x)
    a, b, n, std = _TRANSITIONS[sde_type](
        sigma, sigma_next, first, _per_row(noise_level, x, "noise_level")
    )
    coef = torch.stack(torch.broadcast_tensors(a, b, n, sigma), 1).expand(x.shape[0], 4)
    wide = (-1, *(1,) * (x.ndim - 1))
    more = (std.reshape(wide), torch.sqrt(sigma - sigma_next).reshape(wide))
    more = more if return_sqrt_dt else more[:1]

    differentiable = torch.is_grad_enabled() and (model_output.requires_grad or x.requires_grad)
    if prev_sample is None:
        noise = _randn(x, generator)
        with torch.no_grad():
            o = StepOperands(x, model_output, coef, noise=noise, with_mean=not differentiable)
            stored, log_prob, _, mean = torch.ops.sfgrpo.sde_step(*o)
        if not differentiable and sde_type == "sde":
            return stored, log_prob, mean, *more
    else:
        stored = prev_sample.to(x.dtype)
    log_prob, mean = sde_logprob(
        x, model_output, stored.detach(), coef, return_mean=True,
        density="gaussian" if sde_type == "sde" else "unnormalised",
    )  # fmt: skip
    if prev_sample is None:  # as in the original, the sample itself carries its mean's gradient
        stored = mean + (stored - mean.detach())
    return stored, log_prob, mean, *more


def _flow(sigma: Tensor, sigma_next: Tensor, first: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    """(a, b, n, std_dev_t) of Flow-SDE, in the original's arithmetic."""
    dt = sigma_next - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, first, sigma))) * eta
    a = 1 + std**2 / (2 * sigma) * dt
    b = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return a, b, std * torch.sqrt(-dt), std


def _cps(sigma: Tensor, sigma_next: Tensor, first: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    """The same of Flow-CPS: the clean estimate and the predicted noise, mixed anew."""
    n = sigma_next * torch.sin(eta * (math.pi / 2))
    kept = torch.sqrt((sigma_next**2 - n**2).clamp(min=0))
    a = (1 - sigma_next) + kept
    return a, kept * (1 - sigma) - (1 - sigma_next) * sigma, n, n


_TRANSITIONS = {"sde": _flow, "cps": _cps}


def _per_row(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """``[1]`` or ``[B]`` in the dtype of ``x``; only on the CPU its values are looked at."""
    if not isinstance(value, Tensor):
        return x.new_full((1,), _checks.number(name, value, 0))
    _check_count(name, value, x)
    if value.device.type == "cpu" and not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(f"{name}: got {value.tolist()}, expected finite numbers >= 0")
    return value.detach().to(x.device, x.dtype).reshape(-1)


def _check_count(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.numel() not in (1, x.shape[0]):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [1] or ({len(x)},)")


def _sigmas(
    scheduler: FlowScheduler, timestep: float | Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sigmas of the steps and of the next, each ``[1]`` or ``[B]``, and the schedule's second.

    They are looked up on the device; a timestep that names no step gives nan there.
    """
    times = torch.as_tensor(timestep, device=x.device).reshape(-1)
    _check_count("timestep", times, x)
    schedule = torch.as_tensor(scheduler.timesteps, device=x.device)
    sigmas = torch.as_tensor(scheduler.sigmas, device=x.device).to(x.dtype)
    found = times.unsqueeze(1) == schedule.to(times.dtype).unsqueeze(0)
    lowest = torch.where(found, schedule, torch.inf).amin(1)
    highest = torch.where(found, schedule, -torch.inf).amax(1)
    named = lowest == highest  # not where the dtype of times rounds two entries to one
    if x.device.type == "cpu" and not bool(named.all()):
        row = int((~named).nonzero()[0])
        if not bool(found[row].any()):
            wrong = float(times[row])
            raise ValueError(f"timestep: got {wrong:g}, expected one of scheduler.timesteps")
        raise ValueError(
            f"timestep: got {float(times[row]):g} in {times.dtype}, to which "
            f"{int(found[row].sum())} entries of scheduler.timesteps round; expected one of them, "
            f"in {schedule.dtype}"
        )
    # As diffusers' index_for_timestep: of a timestep that occurs twice, the second.
    order = found.long().cumsum(1)
    target = order[:, -1:].clamp(max=2)
    index = (found & (order == target)).long().argmax(1)
    known = torch.where(named, 1.0, torch.nan).to(x.dtype)
    return sigmas[index] * known, sigmas[index + 1], sigmas[1]


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
