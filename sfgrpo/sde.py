"""Sigma schedule -> one coefficient table `(a, b, n, t)` per sampler.

Every sampler of this field is a Gaussian transition whose mean is affine in state and velocity,

    x_s = a x_t + b v + n eps,      eps ~ N(0, I),      s < t,

so a sampler is a pure function from a pair of noise levels to three numbers, and one kernel
(`sfgrpo.ops.sde_step`) serves them all. Convention: `x_t = (1 - t) x_0 + t x_1`, `v = x_1 - x_0`,
data at t = 0. A step with n = 0 is deterministic: it has no density and takes no part in a loss.

To add a sampler, write one function `(t, s, eta, first) -> (a, b, n)` and decorate it with
`@sampler("name")`, here or in a file of your own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfgrpo.names import unknown_name


class Step(NamedTuple):
    """One transition from noise level `t` to `s`; `first` is the second sigma of the schedule."""

    t: float
    s: float
    eta: float
    first: float


Sampler = Callable[[Step], tuple[float, float, float]]
SAMPLERS: dict[str, Sampler] = {}


def sampler(name: str) -> Callable[[Sampler], Sampler]:
    """Register a sampler under `name`."""

    def register(function: Sampler) -> Sampler:
        SAMPLERS[name] = function
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


@sampler("renoise")
def renoise(step: Step) -> tuple[float, float, float]:
    """Project to x0 and noise afresh (diffusers' `stochastic_sampling=True`)."""
    return _interpolate(step, step.s)


def _schedule(sigmas: Tensor | Sequence[float]) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten().tolist()
    if len(levels) < 2:
        raise ValueError(f"sigmas: need at least 2 noise levels (one step), got {len(levels)}")
    if not all(math.isfinite(s) and 0 <= s <= 1 for s in levels):
        raise ValueError(f"sigmas: every noise level must lie in [0, 1], got {levels}")
    falls = [k for k in range(len(levels) - 1) if levels[k + 1] >= levels[k]]
    if falls:
        k = falls[0]
        raise ValueError(
            f"sigmas: must fall strictly, but sigmas[{k}] = {levels[k]:.6g} is followed by "
            f"sigmas[{k + 1}] = {levels[k + 1]:.6g}"
        )
    return levels


def coefficients(sigmas: Tensor | Sequence[float], kind: str = "ddim", eta: float = 0.7) -> Tensor:
    """The coefficient table of a sampler over a schedule.

    Args:
        sigmas: `[T + 1]` noise levels, strictly falling, within [0, 1] (1 is pure noise).
        kind: a name in `SAMPLERS`: "ode", "flow", "dance", "ddim", "cps", "renoise".
        eta: stochasticity; 0 gives the ODE for every kind but "renoise" (which ignores it).

    Returns:
        `[T, 4]` float32 on the CPU, computed in float64: row k is (a, b, n, t) of the step
        sigmas[k] -> sigmas[k + 1].

    Raises:
        ValueError: unknown kind (with the nearest name), impossible schedule, or an eta whose
            noise a step cannot hold (naming the step).
    """
    if kind not in SAMPLERS:
        raise ValueError(unknown_name("sampler", kind, SAMPLERS))
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta: must be finite and >= 0, got {eta}")
    levels = _schedule(sigmas)
    rows = []
    for k, (t, s) in enumerate(itertools.pairwise(levels)):
        try:
            a, b, n = SAMPLERS[kind](Step(t, s, eta, levels[1]))
        except ValueError as error:
            bound = _largest_eta(kind, Step(t, s, eta, levels[1]))
            raise ValueError(
                f"eta: {eta} is too large for sampler '{kind}' at step {k} "
                f"({t:.4g} -> {s:.4g}): {error}; the largest that fits is {bound:.4g}"
            ) from None
        rows.append((a, b, n, t))
    return torch.tensor(rows, dtype=torch.float64).float()


def _largest_eta(kind: str, step: Step) -> float:
    """The eta at which n reaches s, by bisection below one that is known to be too large."""
    low, high = 0.0, step.eta
    for _ in range(60):
        middle = (low + high) / 2
        try:
            SAMPLERS[kind](step._replace(eta=middle))
            low = middle
        except ValueError:
            high = middle
    return low


def step_weights(coef: Tensor, kind: str = "balanced") -> Tensor:
    """How much each step's rows weigh in the policy term, with mean 1 over the noisy steps.

    The gradient of a row's log-density is b eps / (n D), so a step with little noise shouts: the
    last noisy step of DDIM-SDE, where n is nearly 0, would drown all others in its own noise.

    "equal": every row weighs the same (Flow-GRPO).
    "balanced": proportional to n / |b|, so that the gradients of all steps are of one size. While
        the ratio is 1 this is the correction of GRPO-Guard (Wang et al. 2025, arXiv 2510.22319),
        which scales the log-ratio by n and the loss by 1 / dt.

    Args:
        coef: `[T, 4]` table of `coefficients`.

    Returns:
        `[T]` float32; 0 on noise-free steps.
    """
    _, b, n, _ = coef.double().unbind(-1)
    noisy = n > 0
    kinds = {"equal": noisy.double(), "balanced": torch.where(noisy, n / b.abs(), 0.0)}
    if kind not in kinds:
        raise ValueError(unknown_name("step weights", kind, kinds))
    return (kinds[kind] * noisy.sum() / kinds[kind].sum()).float()


def kl_scale(coef: Tensor, sigmas: Tensor | Sequence[float], kind: str = "gaussian") -> Tensor:
    """Per-step factor c of the KL penalty, KL = c * mean_D (v - v_ref)^2.

    "gaussian": b^2 / (2 n^2), the per-dimension KL of the two transitions.
    "flow_grpo": the same times dt, as Flow-GRPO's code has it; published beta values (0.04, 0.01)
        belong to this one.
    "velocity": 1, the distance of the velocities themselves: it does not grow without bound at
        the last steps, where n is nearly 0.

    Args:
        coef: `[T, 4]` table of `coefficients`. sigmas: `[T + 1]`, the schedule it came from.

    Returns:
        `[T]` float32; 0 on noise-free steps, which take no part in the loss.
    """
    _, b, n, _ = coef.double().unbind(-1)
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    gaussian = torch.where(n > 0, b.square() / (2 * n.square()), 0.0)
    scales = {
        "gaussian": gaussian,
        "flow_grpo": gaussian * (levels[:-1] - levels[1:]),
        "velocity": (n > 0).double(),
    }
    if kind not in scales:
        raise ValueError(unknown_name("kl", kind, scales))
    return scales[kind].float()
