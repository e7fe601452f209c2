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

from typing import Any, Literal, overload

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, differentiate, vectorise
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops._vmap import fold_into_rows

Reduction = Literal["mean", "sum"]


def sde_logprob_reference(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
    with_mean: bool,
) -> tuple[Tensor, Tensor]:
    """The specification: (logp, mean or empty); PyTorch's autograd can differentiate it."""
    dtype = compute_dtype(x)
    a, b, n, _ = columns(coef, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    mean = a * to_rows(x, dtype) + b * velocity
    logp = gaussian_logp(to_rows(x_next, dtype), mean, n)
    if not mean_reduction:
        logp = logp * mean.shape[1]
    return logp, mean.reshape(x.shape) if with_mean else coef.new_empty(0)


def sde_logprob_backward_reference(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
    need_x: bool,
    need_v: bool,
    need_x_next: bool,
    need_v_uncond: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad * logp) + sum(grad_mean * mean)``; empty where not needed.

    In the order (x, v, x_next, v_uncond); the mean does not depend on x_next.
    """
    dtype = compute_dtype(x)
    a, b, n, _ = columns(coef, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    residual = to_rows(x_next, dtype) - (a * to_rows(x, dtype) + b * velocity)
    scale = grad.unsqueeze(1) / (n * n)
    if mean_reduction:
        scale = scale / max(residual.shape[1], 1)
    dlogp = torch.where(n > 0, residual * scale, 0.0)
    dmean = dlogp if grad_mean is None else dlogp + to_rows(grad_mean, dtype)

    def emit(needed: bool, like: Tensor | None, grad_rows: Tensor) -> Tensor:
        if not needed or like is None:
            return x.new_empty(0)
        return grad_rows.to(like.dtype).reshape(like.shape)

    share = 1.0 if v_uncond is None else guidance
    return (
        emit(need_x, x, dmean * a),
        emit(need_v, v, dmean * (b * share)),
        emit(need_x_next, x_next, -dlogp),
        emit(need_v_uncond, v_uncond, dmean * (b * (1.0 - guidance))),
    )


def _fake(x: Tensor, v: Tensor, x_next: Tensor, coef: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return coef.new_empty(x.shape[0]), coef.new_empty(x.shape if rest[-1] else 0)


def _fake_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
    need_x: bool,
    need_v: bool,
    need_x_next: bool,
    need_v_uncond: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def emit(needed: bool, tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if not needed or tensor is None else tensor.new_empty(tensor.shape)

    return (
        emit(need_x, x),
        emit(need_v, v),
        emit(need_x_next, x_next),
        emit(need_v_uncond, v_uncond),
    )


_op = define(
    "sde_logprob(Tensor x, Tensor v, Tensor x_next, Tensor coef, Tensor? v_uncond, float guidance,"
    " bool mean_reduction, bool with_mean) -> (Tensor, Tensor)",
    sde_logprob_reference,
    _fake,
)
_op_backward = define(
    "sde_logprob_backward(Tensor grad, Tensor? grad_mean, Tensor x, Tensor v, Tensor x_next,"
    " Tensor coef, Tensor? v_uncond, float guidance, bool mean_reduction, bool need_x, bool need_v,"
    " bool need_x_next, bool need_v_uncond) -> (Tensor, Tensor, Tensor, Tensor)",
    sde_logprob_backward_reference,
    _fake_backward,
)


vectorise("sde_logprob", fold_into_rows(_op))
vectorise("sde_logprob_backward", fold_into_rows(_op_backward))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, x_next, coef, v_uncond, ctx.guidance, ctx.mean_reduction, ctx.with_mean = inputs
    ctx.save_for_backward(x, v, x_next, coef, v_uncond)


def _backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
    x, v, x_next, coef, v_uncond = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = (wanted[0], wanted[1], wanted[2], wanted[4])
    grads = _op_backward(
        grad, grad_mean if ctx.with_mean else None,
        x, v, x_next, coef, v_uncond, ctx.guidance, ctx.mean_reduction, *needs,
    )  # fmt: skip
    dx, dv, dx_next, dv_uncond = (
        g if needed else None for g, needed in zip(grads, needs, strict=True)
    )
    return dx, dv, dx_next, None, dv_uncond, None, None, None


_call = differentiate("sde_logprob", _backward, _setup_context)


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
        return_mean: also give the transition's mean a x + b v, from the same pass.

    Returns:
        ``[B]`` in the dtype of ``coef``; 0 without gradient for rows with n = 0.  With
        ``return_mean``, beside it the mean ``[B, ...]``, also in the dtype of ``coef``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, or the reduction is unknown.
        RuntimeError: on the CPU, a coefficient is not finite, n < 0 or t outside [0, 1].
    """
    _checks.latents("x", x)
    _checks.like("v", v, x)
    _checks.like("x_next", x_next, x)
    _checks.coefficients(coef, x)
    _checks.no_grad(coef=coef)
    if v_uncond is not None:
        _checks.like("v_uncond", v_uncond, x)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    scale = _checks.number("guidance", guidance)
    logp, mean = _call(x, v, x_next, coef, v_uncond, scale, reduction == "mean", return_mean)
    return (logp, mean) if return_mean else logp
