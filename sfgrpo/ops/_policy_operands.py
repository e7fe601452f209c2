"""What ``sfgrpo::policy_loss`` and its backward take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PolicyOperands(NamedTuple):
    """What the loss takes."""

    x: Tensor
    """``[B, ...]``."""
    v: Tensor
    """Velocity, shape of ``x``."""
    x_next: Tensor
    """The stored state, shape of ``x``."""
    coef: Tensor
    """``[B, 4]``: (a, b, n, t) of the rows."""
    logp_old: Tensor | None
    """``[B]``; None is the log-density of ``v`` itself, of which the ratio takes no gradient."""
    advantages: Tensor
    """``[B]``."""
    v_uncond: Tensor | None
    """Velocity without the prompt, shape of ``x``."""
    guidance: float
    v_ref: Tensor | None
    """The reference model's velocity, already guided, shape of ``x``."""
    clip_low: float
    clip_high: float
    kl_weight: float
    kl_scale: Tensor | None
    """``[B]``, instead of b^2 / (2 n^2)."""
    weights: Tensor | None
    """``[B]``, instead of one over the number of rows with n > 0."""
    reuse_v: bool = False
    """Whether backward writes over ``v`` and ``v_uncond``; nothing to the loss itself."""
    guard: bool = False
    """Whether the log-ratio is scaled by n."""
    v_old: Tensor | None = None
    """The old policy's velocity, already guided, shape of ``x``; with ``guard`` only."""


class PolicyBackwardOperands(NamedTuple):
    """What backward takes; the form in place writes over ``v`` and ``v_uncond``."""

    grad_loss: Tensor
    """Scalar."""
    x: Tensor
    v: Tensor
    x_next: Tensor
    coef: Tensor
    back: Tensor
    """``[B, 2]``: (g1, g2) of the rows."""
    v_uncond: Tensor | None
    guidance: float
    v_ref: Tensor | None
    v_old: Tensor | None = None
    """Given, its residual takes the place of v's."""
