"""Sigma schedule -> one coefficient table `(a, b, n, t)`, and what else depends on the step alone.

The samplers themselves are pure functions of numbers: see `sfgrpo.samplers`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfgrpo.names import SAMPLER, OwnError, blaming_own, unknown_name
from sfgrpo.samplers import SAMPLERS, Sampler, Step, sampler

__all__ = [
    "SAMPLERS",
    "Sampler",
    "Schedule",
    "Step",
    "coefficients",
    "kl_scale",
    "quieted",
    "sampler",
    "step_weights",
]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that depends on the step alone, for the T steps of a trajectory."""

    table: Tensor
    """fp32 `[T, 4]`: the coefficients (a, b, n, t) of each step."""
    kl_scale_T: Tensor
    """fp32 `[T]`: factor of the KL (`kl_scale`)."""
    weight_T: Tensor
    """fp32 `[T]`: weight of the policy term (`step_weights`)."""
    sampled: int
    """How many of the steps are sampled; the image is an estimate of the state behind them."""

    @property
    def trainable_T(self) -> Tensor:
        """bool `[T]`: the steps with noise, which have a density and can learn."""
        return self.table[:, 2] > 0

    def to(self, device: torch.device) -> Schedule:
        """A copy on `device`."""
        return replace(
            self, table=self.table.to(device), kl_scale_T=self.kl_scale_T.to(device),
            weight_T=self.weight_T.to(device),
        )  # fmt: skip


def _levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().tolist()
    if len(levels) < 2:
        raise ValueError(f"sigmas: need at least 2 noise levels (one step), got {len(levels)}")
    if not all(0 <= s <= 1 for s in levels):
        hint = (
            "; one step of a schedule that is stretched between its first step and its last "
            "(shift_terminal) is 0 / 0: use 2 steps or more"
        )
        raise ValueError(
            f"sigmas: every noise level must lie in [0, 1], got {levels}"
            + (hint if math.isnan(levels[0]) else "")
        )
    falls = [k for k in range(len(levels) - 1) if levels[k + 1] >= levels[k]]
    if falls:
        k = falls[0]
        raise ValueError(
            f"sigmas: must fall strictly, but sigmas[{k}] = {levels[k]:.6g} is followed by "
            f"sigmas[{k + 1}] = {levels[k + 1]:.6g}"
        )
    return levels


def coefficients(
    sigmas: Tensor | Sequence[float],
    sampler: str = "ddim",
    eta: float = 0.7,
    *,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The coefficient table of a sampler over a schedule.

    Args:
        sigmas: `[T + 1]` noise levels, strictly falling, within [0, 1] (1 is pure noise).
        sampler: "ode", "flow", "dance", "ddim", "cps", "precise", "renoise", or
            "module:function".
        eta: stochasticity; 0 gives the ODE for every sampler but "renoise" (which ignores it).
        options: what the sampler takes beside the step.

    Returns:
        `[T, 4]` float32 on the CPU, computed in float64: row k is (a, b, n, t) of the step
        sigmas[k] -> sigmas[k + 1].

    Raises:
        ValueError: unknown sampler or option (with the nearest name), impossible schedule,
            coefficients that are no transition, or an eta whose noise a step cannot hold (naming
            the step).
    """
    function = SAMPLER.bind(sampler, options)
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta: must be finite and >= 0, got {eta}")
    levels = _levels(sigmas)
    rows = []
    for k, (t, s) in enumerate(itertools.pairwise(levels)):
        step, place = Step(t, s, eta, levels[1]), f"step {k} ({t:.4g} -> {s:.4g})"
        try:
            a, b, n = _transition(sampler, function, step)
        except ValueError as error:
            bound = _largest_eta(sampler, function, step)
            if bound is None:  # it is not for its noise that it refuses
                raise ValueError(f"sampler '{sampler}' at {place}: {error}") from error
            raise ValueError(
                f"eta: {eta} is too large for sampler '{sampler}' at {place}: {error}; the largest "
                f"that fits is {bound:.4g}"
            ) from None
        rows.append((a, b, n, t))
    return torch.tensor(rows, dtype=torch.float64, device="cpu").float()


def _transition(name: str, function: Sampler, step: Step) -> tuple[float, float, float]:
    """What a sampler returns, if it is a transition."""
    with blaming_own(name, OwnError, "it failed"):
        found = function(step)
    if not (isinstance(found, tuple) and len(found) == 3 and all(map(_is_number, found))):
        raise ValueError(f"it returned {found!r}, expected the three numbers (a, b, n)")
    a, b, n = (float(number) for number in found)
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(n) and n >= 0):
        raise ValueError(f"(a, b, n) = {found}, expected finite numbers and n >= 0")
    return a, b, n


def _is_number(found: object) -> bool:
    """Whether `found` is a real number, also NumPy's or a tensor's of one element."""
    return not isinstance(found, (str, bytes)) and hasattr(type(found), "__float__")


def _largest_eta(name: str, function: Sampler, step: Step) -> float | None:
    """The eta at which the sampler begins to refuse the step, by bisection; None if it is 0."""
    low, high = None, step.eta
    for _ in range(60):
        middle = 0.0 if low is None else (low + high) / 2
        try:
            _transition(name, function, step._replace(eta=middle))
            low = middle
        except ValueError:
            if low is None:
                return None
            high = middle
    return low


def quieted(table: Tensor, sigmas: Tensor | Sequence[float], quiet_T: Tensor) -> Tensor:
    """The table with the ODE's own step in the rows where `quiet_T` is true.

    Args:
        table: `[T, 4]` of `coefficients`. sigmas: `[T + 1]`, the schedule it came from.
        quiet_T: bool `[T]`.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten()
    t, s = levels[:-1], levels[1:]
    ode = torch.stack([torch.ones_like(t), s - t, torch.zeros_like(t), t], 1).float()
    return torch.where(quiet_T[:, None], ode, table)


def step_weights(coef: Tensor, kind: str = "balanced", ratio: str = "density") -> Tensor:
    """How much each step's rows weigh in the policy term, with mean 1 over the noisy steps.

    The gradient of a row's log-density is b eps / (n D), so a step with little noise shouts: the
    last noisy step of DDIM-SDE, where n is nearly 0, would drown all others in its own noise.

    "equal": every row weighs the same (Flow-GRPO).
    "balanced": proportional to n / |b|, so that the gradients of all steps are of one size. While
        the ratio is 1 this is the correction of GRPO-Guard (Wang et al. 2025, arXiv 2510.22319),
        which scales the log-ratio by n and the loss by 1 / dt.

    Args:
        coef: `[T, 4]` table of `coefficients`.
        ratio: of which ratio (`sfgrpo.ops.policy_loss`); "guard" has the factor n in it already.

    Returns:
        `[T]` float32; 0 on noise-free steps.
    """
    _, b, n, _ = coef.double().unbind(-1)
    noisy = n > 0
    size = b.abs() if ratio == "guard" else b.abs() / n
    kinds = {"equal": noisy.double(), "balanced": torch.where(noisy, 1 / size, 0.0)}
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
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten()
    gaussian = torch.where(n > 0, b.square() / (2 * n.square()), 0.0)
    scales = {
        "gaussian": gaussian,
        "flow_grpo": gaussian * (levels[:-1] - levels[1:]),
        "velocity": (n > 0).double(),
    }
    if kind not in scales:
        raise ValueError(unknown_name("kl", kind, scales))
    return scales[kind].float()
