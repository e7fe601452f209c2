"""Log-density of a stored transition, differentiable in the velocity.

    logp = -mean_D (x_next - a x - b v)^2 / (2 n^2) - ln n - ln(2 pi) / 2

Reduction "mean" is per element, the field's convention (Flow-GRPO, arXiv 2505.05470); "sum" is D
times that, the true log-density.  The gradient is closed form, with residual r = x_next - a x - b v
and k = 1 (sum) or 1 / D (mean):

    dlogp/dx_next = -k r / n^2,   dlogp/dx = a k r / n^2,   dlogp/dv = b k r / n^2

The mean a x + b v itself comes from the same pass if asked for, and its gradient flows back in the
same backward pass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._calls import differentiate, differentiate_once
from sfgrpo.ops._density import Density, is_gaussian, unnormalised
from sfgrpo.ops._library import define, vectorise
from sfgrpo.ops._remember import remembered
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops._vmap import fold_into_rows

Reduction = Literal["mean", "sum"]
DIFFERENTIABLE = ("x", "v", "x_next", "v_uncond")
"""Operands that have a gradient, in the order in which backward returns it."""


class LogprobOperands(NamedTuple):
    """What the density takes."""

    x: Tensor
    """``[B, ...]``."""
    v: Tensor
    """Velocity, shape of ``x``."""
    x_next: Tensor
    """The stored state, shape of ``x``."""
    coef: Tensor
    """``[B, 4]``: (a, b, n, t) of the rows."""
    v_uncond: Tensor | None
    """Velocity without the prompt, shape of ``x``."""
    guidance: float
    mean_reduction: bool
    """Per element instead of summed over them."""
    with_mean: bool
    """Whether the transition's mean is wanted."""


class LogprobBackwardOperands(NamedTuple):
    """Gradients of the results, the operands, and which gradients are wanted."""

    grad: Tensor
    """``[B]``."""
    grad_mean: Tensor | None
    """Shape of ``x``."""
    x: Tensor
    v: Tensor
    x_next: Tensor
    coef: Tensor
    v_uncond: Tensor | None
    guidance: float
    mean_reduction: bool
    need_x: bool
    need_v: bool
    need_x_next: bool
    need_v_uncond: bool

    def wanted(self) -> tuple[Tensor | None, ...]:
        """(x, v, x_next, v_uncond), the order of the results; None where no gradient is wanted."""
        return (
            self.x if self.need_x else None,
            self.v if self.need_v else None,
            self.x_next if self.need_x_next else None,
            self.v_uncond if self.need_v_uncond else None,
        )


def sde_logprob_reference(o: LogprobOperands) -> tuple[Tensor, Tensor]:
    """The specification: (logp, mean or empty); PyTorch's autograd can differentiate it."""
    dtype = compute_dtype(o.x)
    a, b, n, _ = columns(o.coef, dtype)
    mean = a * to_rows(o.x, dtype) + b * guided(o.v, o.v_uncond, o.guidance, dtype)
    logp = gaussian_logp(to_rows(o.x_next, dtype), mean, n)
    if not o.mean_reduction:
        logp = logp * mean.shape[1]
    return logp, mean.reshape(o.x.shape) if o.with_mean else o.coef.new_empty(0)


def sde_logprob_backward_reference(
    o: LogprobBackwardOperands,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad * logp) + sum(grad_mean * mean)``; empty where not needed.

    In the order (x, v, x_next, v_uncond); the mean does not depend on x_next.
    """
    dtype = compute_dtype(o.x)
    a, b, n, _ = columns(o.coef, dtype)
    velocity = guided(o.v, o.v_uncond, o.guidance, dtype)
    residual = to_rows(o.x_next, dtype) - (a * to_rows(o.x, dtype) + b * velocity)
    scale = o.grad.unsqueeze(1) / (n * n)
    if o.mean_reduction:
        scale = scale / max(residual.shape[1], 1)
    dlogp = torch.where(n > 0, residual * scale, 0.0)
    dmean = dlogp if o.grad_mean is None else dlogp + to_rows(o.grad_mean, dtype)
    share = 1.0 if o.v_uncond is None else o.guidance
    rows = (dmean * a, dmean * (b * share), -dlogp, dmean * (b * (1.0 - o.guidance)))
    dx, dv, dx_next, dv_uncond = (
        o.x.new_empty(0) if like is None else grad.to(like.dtype).reshape(like.shape)
        for grad, like in zip(rows, o.wanted(), strict=True)
    )
    return dx, dv, dx_next, dv_uncond


def _fake(o: LogprobOperands) -> tuple[Tensor, Tensor]:
    return o.coef.new_empty(o.x.shape[0]), o.coef.new_empty(o.x.shape if o.with_mean else 0)


def _fake_backward(o: LogprobBackwardOperands) -> tuple[Tensor, ...]:
    return tuple(
        o.x.new_empty(0) if like is None else like.new_empty(like.shape) for like in o.wanted()
    )


_op = define("sde_logprob", LogprobOperands, sde_logprob_reference, _fake)
_op_backward = define(
    "sde_logprob_backward", LogprobBackwardOperands, sde_logprob_backward_reference, _fake_backward
)
_call_backward = differentiate_once("sde_logprob_backward")
vectorise("sde_logprob", fold_into_rows(_op))
vectorise("sde_logprob_backward", fold_into_rows(_op_backward))


def _setup_context(ctx: Any, o: LogprobOperands, output: tuple[Tensor, Tensor]) -> None:
    ctx.guidance, ctx.mean_reduction, ctx.with_mean = o.guidance, o.mean_reduction, o.with_mean
    # Else zeros are made in the shape of the result that nobody used.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(o.x, o.v, o.x_next, o.coef, o.v_uncond)


def _backward(
    ctx: Any, needed: dict[str, bool], grad: Tensor | None, grad_mean: Tensor | None
) -> dict[str, Tensor | None]:
    if grad is None and grad_mean is None:
        return {}
    x, v, x_next, coef, v_uncond = ctx.saved_tensors
    of_logp = coef.new_zeros(coef.shape[0]) if grad is None else grad
    o = LogprobBackwardOperands(
        of_logp, grad_mean if ctx.with_mean else None, x, v, x_next, coef, v_uncond, ctx.guidance,
        ctx.mean_reduction, *map(needed.__getitem__, DIFFERENTIABLE),
    )  # fmt: skip
    found = zip(DIFFERENTIABLE, _call_backward(o), o.wanted(), strict=True)
    return {name: gradient for name, gradient, like in found if like is not None}


_call = differentiate("sde_logprob", _backward, _setup_context, DIFFERENTIABLE)


@remembered
def _accepted(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    reduction: str,
    density: str,
) -> tuple[float, bool]:
    """(the guidance's scale, whether the density is the Gaussian's)."""
    _checks.latents("x", x)
    _checks.like("v", v, x)
    _checks.like("x_next", x_next, x)
    _checks.coefficients(coef, x)
    _checks.no_grad(coef=coef)
    if v_uncond is not None:
        _checks.like("v_uncond", v_uncond, x)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    return _checks.number("guidance", guidance), is_gaussian(density)


@overload
def sde_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    *,
    v_uncond: Tensor | None = ...,
    guidance: float = ...,
    reduction: Reduction = ...,
    density: Density = ...,
    return_mean: Literal[False] = ...,
) -> Tensor: ...


@overload
def sde_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    *,
    v_uncond: Tensor | None = ...,
    guidance: float = ...,
    reduction: Reduction = ...,
    density: Density = ...,
    return_mean: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sde_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    reduction: Reduction = "mean",
    density: Density = "gaussian",
    return_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density ``[B]`` (nats) of ``x_next`` under ``N(a x + b v, n^2)``.

    Differentiable, once, in ``x``, ``v``, ``x_next`` and ``v_uncond``.

    Traffic per element (fp32): 12 bytes: reads x, v, x_next.
    Traffic per element (fp32), backward: 16 bytes: reads x, v, x_next; writes grad_v.
    ``return_mean`` adds the tensor it writes, and backward the gradient it reads.

    Args:
        x, v, x_next: ``[B, ...]``, one shape; float32, bfloat16 and float16 may be mixed
            (arithmetic in float32), float64 may not.
        coef: ``[B, 4]`` float32 (float64 beside float64), columns (a, b, n, t).
        v_uncond: velocity without the prompt; ``v`` is then the one with it.
        guidance: scale w of ``v_uncond + w (v - v_uncond)``.
        reduction: "mean" per element, or "sum" over them.
        density: "gaussian", or "unnormalised": the reduction of -(x_next - a x - b v)^2, which is
            Flow-CPS's (arXiv 2509.05952).
        return_mean: also give the transition's mean a x + b v, from the same pass.

    Returns:
        ``[B]`` in the dtype of ``coef``; 0 without gradient for rows with n = 0.  With
        ``return_mean``, beside it the mean ``[B, ...]``, also in the dtype of ``coef``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, or the reduction or
            density is unknown.
        RuntimeError: on the CPU, a coefficient is not finite, n < 0 or t outside [0, 1]; when its
            gradient is differentiated.
    """
    scale, gaussian = _accepted(x, v, x_next, coef, v_uncond, guidance, reduction, density)
    shift = None
    if not gaussian:
        coef, shift = unnormalised(coef, x)
        shift = shift if reduction == "mean" else shift * x[:1].numel()
    o = LogprobOperands(x, v, x_next, coef, v_uncond, scale, reduction == "mean", return_mean)
    logp, mean = _call(o)
    logp = logp if shift is None else logp + shift
    return (logp, mean) if return_mean else logp
