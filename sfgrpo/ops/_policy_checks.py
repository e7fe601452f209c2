"""The argument checks of ``policy_loss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._density import Density, is_gaussian
from sfgrpo.ops._remember import remembered

Ratio = Literal["density", "guard"]


class PolicySettings(NamedTuple):
    """What is not a tensor, in the form that the op takes."""

    clip_low: float
    clip_high: float
    guidance: float
    kl_weight: float
    gaussian: bool
    guard: bool


@remembered
def policy_settings(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    logp_old: Tensor | None,
    advantages: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    v_ref: Tensor | None,
    clip_range: float | Sequence[float],
    kl_weight: float,
    kl_scale: Tensor | None,
    weights: Tensor | None,
    density: Density,
    ratio: Ratio,
    v_old: Tensor | None,
) -> PolicySettings:
    """Check the arguments of ``policy_loss``, which says what is raised."""
    _checks.latents("x", x)
    _checks.like("v", v, x)
    _checks.like("x_next", x_next, x)
    _checks.coefficients(coef, x)
    for name, tensor in (("v_uncond", v_uncond), ("v_ref", v_ref), ("v_old", v_old)):
        if tensor is not None:
            _checks.like(name, tensor, x)
    _checks.per_row("advantages", advantages, x)
    rows = {"logp_old": logp_old, "kl_scale": kl_scale, "weights": weights}
    for name, tensor in rows.items():
        if tensor is not None:
            _checks.per_row(name, tensor, x)
    _checks.no_grad(
        x=x, x_next=x_next, coef=coef, advantages=advantages, v_ref=v_ref, v_old=v_old, **rows
    )
    low, high = _checks.clip_bounds(clip_range)
    guard = _is_guard(ratio, density)
    if v_old is not None and not guard:
        raise ValueError("v_old: got a tensor with ratio 'density', expected ratio 'guard'")
    scale = _checks.number("guidance", guidance)
    beta = _checks.number("kl_weight", kl_weight, 0.0)
    if beta and v_ref is None:
        raise ValueError(
            f"kl_weight: got {kl_weight} without v_ref, expected the reference's velocity, which "
            "the KL is taken to; with kl_weight=0 there is none"
        )
    return PolicySettings(low, high, scale, beta, is_gaussian(density), guard)


def _is_guard(ratio: str, density: str) -> bool:
    if ratio not in get_args(Ratio):
        raise ValueError(f"ratio: got {ratio!r}, expected 'density' or 'guard'")
    if ratio == "guard" and not is_gaussian(density):
        raise ValueError(
            f"ratio: got 'guard' with density {density!r}, expected 'gaussian': "
            "the scale by n is that of the Gaussian's log-density"
        )
    return ratio == "guard"
