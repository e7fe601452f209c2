"""Samplers: from one step's noise levels to the coefficients of its Gaussian transition.

Every sampler of this field is a Gaussian transition whose mean is affine in state and velocity,

    x_s = a x_t + b v + n eps,      eps ~ N(0, I),      s < t,

so a sampler is a pure function of numbers, `step -> (a, b, n)`, and one kernel
(`sfgrpo.ops.sde_step`) serves them all. Convention: `x_t = (1 - t) x_0 + t x_1`, `v = x_1 - x_0`,
data at t = 0. A step with n = 0 is deterministic: it has no density and takes no part in a loss.

To add a sampler, write one such function: here, decorated with `@sampler("name")`, or in a file of
your own, which a recipe names "module:function". What it takes beside the step are its options
(`sample.sampler_options`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from sfgrpo.names import SAMPLER


class Step(NamedTuple):
    """One transition from noise level `t` to `s`; `first` is the second sigma of the schedule."""

    t: float
    s: float
    eta: float
    first: float


Sampler = Callable[..., tuple[float, float, float]]
"""`(step, **options) -> (a, b, n)`."""
SAMPLERS = SAMPLER.registered
"""Name -> sampler."""


def sampler(name: str) -> Callable[[Sampler], Sampler]:
    """Let `name` mean the decorated sampler in this process."""

    def register(function: Sampler) -> Sampler:
        SAMPLER.register(name, function)
        return function

    return register


def _interpolate(step: Step, n: float) -> tuple[float, float, float]:
    """x_s = (1-s) x0_hat + sqrt(s^2 - n^2) x1_hat + n eps, written in x_t and v."""
    t, s, _, _ = step
    if n > s * (1 + 1e-12):
        raise ValueError(f"noise std {n:.4g} exceeds the noise level s = {s:.4g} it leads to")
    k = math.sqrt(max(s * s - n * n, 0.0))
    return (1 - s) + k, k * (1 - t) - (1 - s) * t, n


def _langevin(step: Step, sig: float) -> tuple[float, float, float]:
    """Euler-Maruyama on the SDE with diffusion `sig` that keeps the ODE's marginals."""
    t, s, _, _ = step
    dt = t - s
    drift = sig * sig / (2 * t)
    return 1 - drift * dt, -(1 + drift * (1 - t)) * dt, sig * math.sqrt(dt)


@sampler("ode")
def ode(step: Step) -> tuple[float, float, float]:
    """Euler on the probability-flow ODE (diffusers' FlowMatchEulerDiscreteScheduler)."""
    return 1.0, step.s - step.t, 0.0


@sampler("flow")
def flow(step: Step) -> tuple[float, float, float]:
    """Flow-SDE of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470, eq. 9 and its code at t = 1)."""
    t = step.first if step.t >= 1 else step.t
    return _langevin(step, step.eta * math.sqrt(step.t / (1 - t)))


@sampler("dance")
def dance(step: Step) -> tuple[float, float, float]:
    """Constant-diffusion SDE of DanceGRPO (Xue et al. 2025, arXiv 2505.07818)."""
    return _langevin(step, step.eta)


@sampler("ddim")
def ddim(step: Step) -> tuple[float, float, float]:
    """DDIM-inspired SDE of Stepwise-Flow-GRPO (Savani et al. 2026, arXiv 2603.28718)."""
    return _interpolate(step, step.eta * step.s * math.sqrt(max(1 - step.t, 0.0)))


@sampler("cps")
def cps(step: Step) -> tuple[float, float, float]:
    """Coefficient-preserving sampling (Flow-CPS, Wang & Yu 2025, arXiv 2509.05952)."""
    return _interpolate(step, step.s * math.sin(step.eta * math.pi / 2))


@sampler("precise")
def precise(step: Step) -> tuple[float, float, float]:
    """Precise (Zou et al. 2026, arXiv 2605.23522): the SDE's exact step while the clean estimate
    stays what it is. It forgets the noise at the rate at which the log-SNR rises, so its noise
    falls with the steps' length; at t = 1 it draws all of it afresh."""
    t, s, eta, _ = step
    kept = (s * (1 - t) / (t * (1 - s))) ** (eta * eta)
    return _interpolate(step, s * math.sqrt(max(1 - kept, 0.0)))


@sampler("renoise")
def renoise(step: Step) -> tuple[float, float, float]:
    """Project to x0 and noise afresh (diffusers' `stochastic_sampling=True`)."""
    return _interpolate(step, step.s)
