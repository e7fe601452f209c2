"""Clipped policy-gradient loss with a KL term on rows of transitions, in one fused pass.

Per row r, with logp as in ``sde_logprob`` (reduction "mean"):

    ratio     = exp(logp - logp_old)
    surrogate = -min(A ratio, A clip(ratio, 1 - low, 1 + high))          (PPO, arXiv 1707.06347)
    kl        = kl_scale mean_D (v - v_ref)^2
    loss      = sum_r weight_r (surrogate_r + kl_weight kl_r)

The default kl_scale = b^2 / (2 n^2) makes kl the Gaussian KL divergence per element.  The gradient
in v is affine in the inputs, with two numbers per row,

    dloss/dv = g1 (x_next - a x - b v) + g2 (v - v_ref)
    g1 = -weight A ratio [not clipped] b / (n^2 D),     g2 = 2 weight kl_weight kl_scale / D

so nothing of the latents' size is saved beyond the inputs, and the gradient may take the place of
v.

GRPO-Guard's ratio (arXiv 2510.22319) has the log-ratio re-centred and scaled by n.  With the mean's
move d = b (v - v_old) and the noise eps = (x_next - a x - b v_old) / n,

    log ratio = n (logp - logp_old + mean_D d^2 / (2 n^2)) = mean_D(eps d)

The density's log-ratio is mean_D(eps d) / n - mean_D d^2 / (2 n^2): it spreads 1 / n times as
wide, so that one clip range cannot fit all steps, and about a mean below 0, so that the clip cuts
unevenly.  The gradient has n times the g1 above, and v_old's residual in place of v's.  Without
v_old only the scale is applied, to logp - logp_old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfgrpo.ops import _checks, _overlap
from sfgrpo.ops._calls import differentiate, differentiate_once, in_place
from sfgrpo.ops._density import Density, gaussian_kl_scale, unnormalised
from sfgrpo.ops._library import define, vectorise
from sfgrpo.ops._policy_checks import Ratio, policy_settings
from sfgrpo.ops._policy_operands import PolicyBackwardOperands, PolicyOperands
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops._vmap import one_by_one


class PolicyStats(NamedTuple):
    """Per-row diagnostics, each ``[B]`` and detached; rows with n = 0 hold 0, 1, 0, 0, 0."""

    logp: Tensor
    """Log-density under the current policy, mean per element, nats."""
    ratio: Tensor
    """exp(logp - logp_old) or GRPO-Guard's: the one that the clip saw."""
    clipped: Tensor
    """1 where the clip is active, i.e. where it cuts the gradient; else 0."""
    kl: Tensor
    """kl_scale mean_D (v - v_ref)^2, before kl_weight; 0 without v_ref."""
    surrogate: Tensor
    """-min(A ratio, A clip(ratio)), unweighted."""


class PolicyLoss(NamedTuple):
    """The scalar to minimise and the rows' diagnostics."""

    loss: Tensor
    stats: PolicyStats


def policy_loss_reference(o: PolicyOperands) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: (loss, stats ``[B, 5]``, back ``[B, 2]`` = (g1, g2)).

    PyTorch's autograd can differentiate the loss, independently of the closed form in ``back``.
    """
    dtype = compute_dtype(o.x)
    a, b, n, _ = columns(o.coef, dtype)
    velocity = guided(o.v, o.v_uncond, o.guidance, dtype)
    mean = a * to_rows(o.x, dtype) + b * velocity
    elements = max(mean.shape[1], 1)
    b, n = b[:, 0], n[:, 0]
    noisy = n > 0
    variance = torch.where(noisy, n * n, 1.0)

    logp = gaussian_logp(to_rows(o.x_next, dtype), mean, n.unsqueeze(1))
    per_nat = torch.where(noisy, n, 1.0) if o.guard else torch.ones_like(n)
    logp_old = logp.detach() if o.logp_old is None else o.logp_old
    log_ratio = per_nat * (logp - logp_old)
    if o.v_old is not None:
        old = to_rows(o.v_old, dtype)
        noise = to_rows(o.x_next, dtype) - (a * to_rows(o.x, dtype) + b.unsqueeze(1) * old)
        move = (noise * (velocity - old)).sum(dim=1) / elements
        log_ratio = b * move / per_nat
    ratio = torch.where(noisy, torch.exp(log_ratio), 1.0)
    unclipped = o.advantages * ratio
    limited = o.advantages * ratio.clamp(1.0 - o.clip_low, 1.0 + o.clip_high)
    surrogate = torch.where(noisy, -torch.minimum(unclipped, limited), 0.0)
    active = noisy & (limited < unclipped)

    scale = b * b / (2.0 * variance) if o.kl_scale is None else o.kl_scale
    scale = torch.where(noisy, scale, 0.0)
    square = torch.zeros_like(ratio)
    if o.v_ref is not None:
        square = (velocity - to_rows(o.v_ref, dtype)).square().sum(dim=1) / elements
    kl = scale * square
    weights = o.weights
    if weights is None:
        weights = 1.0 / noisy.sum().clamp(min=1).to(dtype).expand_as(ratio)
    loss = (torch.where(noisy, weights, 0.0) * (surrogate + o.kl_weight * kl)).sum()

    slope = per_nat * b / (variance * elements)
    g1 = torch.where(noisy & ~active, -weights * unclipped * slope, 0.0)
    g2 = torch.where(noisy, 2.0 * o.kl_weight * weights * scale / elements, 0.0)
    if o.v_ref is None:
        g2 = torch.zeros_like(g2)
    stats = torch.stack((logp, ratio, active.to(dtype), kl, surrogate), dim=1)
    return loss, stats.detach(), torch.stack((g1, g2), dim=1).detach()


def policy_loss_backward_reference(o: PolicyBackwardOperands) -> tuple[Tensor, Tensor]:
    """(grad_v, grad_v_uncond) in the dtypes of v and v_uncond; the second empty without it."""
    dtype = compute_dtype(o.x)
    a, b, _, _ = columns(o.coef, dtype)
    velocity = guided(o.v, o.v_uncond, o.guidance, dtype)
    g1, g2 = (o.grad_loss * o.back).unsqueeze(2).unbind(1)
    scored = velocity if o.v_old is None else to_rows(o.v_old, dtype)
    grad = g1 * (to_rows(o.x_next, dtype) - (a * to_rows(o.x, dtype) + b * scored))
    if o.v_ref is not None:
        grad = grad + g2 * (velocity - to_rows(o.v_ref, dtype))
    if o.v_uncond is None:
        return grad.to(o.v.dtype).reshape(o.v.shape), o.v.new_empty(0)
    return (
        (o.guidance * grad).to(o.v.dtype).reshape(o.v.shape),
        ((1.0 - o.guidance) * grad).to(o.v_uncond.dtype).reshape(o.v_uncond.shape),
    )


def policy_loss_backward__reference(o: PolicyBackwardOperands) -> None:
    """The specification of the op that writes the gradients over v and v_uncond."""
    grad_v, grad_v_uncond = policy_loss_backward_reference(o)
    o.v.copy_(grad_v)
    if o.v_uncond is not None:
        o.v_uncond.copy_(grad_v_uncond)


def _fake(o: PolicyOperands) -> tuple[Tensor, ...]:
    return tuple(o.coef.new_empty(shape) for shape in ((), (o.x.shape[0], 5), (o.x.shape[0], 2)))


def _fake_backward(o: PolicyBackwardOperands) -> tuple[Tensor, Tensor]:
    second = o.v.new_empty(0) if o.v_uncond is None else o.v_uncond.new_empty(o.v_uncond.shape)
    return o.v.new_empty(o.v.shape), second


_op = define("policy_loss", PolicyOperands, policy_loss_reference, _fake)
_op_backward = define(
    "policy_loss_backward", PolicyBackwardOperands, policy_loss_backward_reference, _fake_backward
)
define(
    "policy_loss_backward_",
    PolicyBackwardOperands,
    policy_loss_backward__reference,
    written=("v", "v_uncond"),
    instead="policy_loss with reuse_v=False",
)
_call_backward = differentiate_once("policy_loss_backward")
_call_backward_in_place = in_place("policy_loss_backward_")
vectorise("policy_loss", one_by_one(_op))
vectorise("policy_loss_backward", one_by_one(_op_backward))


def _setup_context(ctx: Any, o: PolicyOperands, output: tuple[Tensor, ...]) -> None:
    ctx.guidance, ctx.reuse_v = o.guidance, o.reuse_v
    # The statistics have no gradient: else zeros in their shape are made for every backward.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(o.x, o.v, o.x_next, o.coef, output[2], o.v_uncond, o.v_ref, o.v_old)


def _backward(
    ctx: Any, needed: dict[str, bool], grad_loss: Tensor | None, *_: None
) -> dict[str, Tensor | None]:
    if grad_loss is None:
        return {}
    x, v, x_next, coef, back, v_uncond, *others = ctx.saved_tensors
    o = PolicyBackwardOperands(grad_loss, x, v, x_next, coef, back, v_uncond, ctx.guidance, *others)
    # A graph being compiled learns of storages, not of places: there both may not even share one.
    if ctx.reuse_v and not _overlap.traced_together(v, v_uncond):
        _call_backward_in_place(o)
        return {"v": v.detach(), "v_uncond": None if v_uncond is None else v_uncond.detach()}
    grad_v, grad_v_uncond = _call_backward(o)
    return {"v": grad_v, "v_uncond": None if v_uncond is None else grad_v_uncond}


_call = differentiate("policy_loss", _backward, _setup_context, ("v", "v_uncond"))


def policy_loss(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    logp_old: Tensor | None,
    advantages: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    v_ref: Tensor | None = None,
    clip_range: float | Sequence[float] = 1e-4,
    kl_weight: float = 0.0,
    kl_scale: Tensor | None = None,
    weights: Tensor | None = None,
    density: Density = "gaussian",
    ratio: Ratio = "density",
    v_old: Tensor | None = None,
    reuse_v: bool = False,
) -> PolicyLoss:
    """Policy-gradient loss of B transitions, differentiable, once, in ``v`` and ``v_uncond``.

    Traffic per element (fp32): 16 bytes: reads x, v, x_next, v_ref.
    Traffic per element (fp32), backward: 20 bytes: reads x, v, x_next, v_ref; writes grad_v.
    With v_old 4 bytes more each way; without v_ref backward reads it in place of v.

    Args:
        x, v, x_next: ``[B, ...]``, dtypes as in ``sde_logprob``.
        coef: ``[B, 4]`` float32 (float64 beside float64), columns (a, b, n, t).
        logp_old: ``[B]``, log-density when sampled (reduction "mean", the same density).  None
            is that of these very velocities, as a constant: the ratio is 1 exactly, never clipped,
            and the gradient is the policy gradient, -weight A dlogp/dv (n times that if "guard").
        advantages: ``[B]``.
        v_uncond, guidance: classifier-free guidance as in ``sde_step``.
        v_ref: the reference model's velocity, already guided, shape of ``x``.
        clip_range: c for [1 - c, 1 + c], or (low, high) for [1 - low, 1 + high].
        kl_weight: beta; with 0 the KL is still reported when ``v_ref`` is given.
        kl_scale: ``[B]``, replaces b^2 / (2 n^2) for other conventions of the KL.
        weights: ``[B]``; default one over the number of rows with n > 0.
        density: of ``logp_old`` and the ratio, as in ``sde_logprob``; the KL is the Gaussian's.
        ratio: of the densities, or "guard": GRPO-Guard's, whose logarithm is scaled by n (Gaussian
            densities only).  The paper's division of the loss by dt is for ``weights``.
        v_old: the old policy's velocity, already guided, shape of ``x``: re-centres the guard's
            ratio, for which ``logp_old`` is then not looked at and may be None.  Without it the
            bias -mean_D d^2 / (2 n) stays in the log-ratio.  It and its gradient are 0 while the
            policy has not moved, and it equals the log-ratio's spread at rms d = 2 n / sqrt(D).
        reuse_v: let backward write the gradients over ``v`` and ``v_uncond`` instead of allocating
            as much again: for velocities that nobody reads afterwards.  Whatever else had saved
            them for its own backward raises PyTorch's error of a modified tensor; a parameter, and
            velocities that share memory with each other or partly with another operand, are an
            error at once.

    Returns:
        The scalar loss and the rows' statistics.  Rows with n = 0 take no part.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape, device or range, a tensor other than ``v`` and ``v_uncond``
            requires grad, or ``reuse_v`` would overwrite what it must not.
        RuntimeError: on the CPU, a coefficient is not finite, n < 0 or t outside [0, 1]; when its
            gradient is differentiated.
    """
    settings = policy_settings(
        x, v, x_next, coef, logp_old, advantages, v_uncond, guidance, v_ref, clip_range, kl_weight,
        kl_scale, weights, density, ratio, v_old,
    )  # fmt: skip
    low, high, scale, beta, gaussian, guard = settings
    shift = None
    if not gaussian:
        kl_scale = gaussian_kl_scale(coef) if kl_scale is None else kl_scale
        coef, shift = unnormalised(coef, x)
        logp_old = None if logp_old is None else logp_old - shift
    o = PolicyOperands(
        x, v, x_next, coef, logp_old, advantages, v_uncond, scale, v_ref, low, high, beta,
        kl_scale, weights, reuse_v, guard, v_old,
    )  # fmt: skip
    if reuse_v and torch.is_grad_enabled():
        _overlap.overwritable(o, ("v", "v_uncond"))
        _checks.not_a_leaf("v", v)
        _checks.not_a_leaf("v_uncond", v_uncond)
    loss, stats, _ = _call(o)
    rows_stats = PolicyStats(*stats.unbind(1))
    if shift is not None:
        rows_stats = rows_stats._replace(logp=rows_stats.logp + shift)
    return PolicyLoss(loss, rows_stats)
