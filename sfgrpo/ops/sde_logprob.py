"""Log-density of a stored transition, differentiable in the velocity.

    logp = -mean_D (x_next - a x - b v)^2 / (2 n^2) - ln n - ln(2 pi) / 2

Reduction "mean" is per element, the field's convention (Flow-GRPO, arXiv 2505.05470); "sum" is D
times that, the true log-density.  The gradient is closed form, with residual r = x_next - a x - b v
and k = 1 (sum) or 1 / D (mean):

    dlogp/dx_next = -k r / n^2,   dlogp/dx = a k r / n^2,   dlogp/dv = b k r / n^2
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, differentiate
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows

Reduction = Literal["mean", "sum"]


def sde_logprob_reference(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    v_uncond: Tensor | None,
    guidance: float,
    mean_reduction: bool,
) -> Tensor:
    """The specification of ``sde_logprob``; PyTorch's autograd can differentiate it."""
    dtype = compute_dtype(x)
    a, b, n, _ = columns(coef, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    mean = a * to_rows(x, dtype) + b * velocity
    logp = gaussian_logp(to_rows(x_next, dtype), mean, n)
    return logp if mean_reduction else logp * mean.shape[1]


def sde_logprob_backward_reference(
    grad: Tensor,
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
    """Gradients of ``sum(grad * logp)`` in (x, v, x_next, v_uncond); empty where not needed."""
    dtype = compute_dtype(x)
    a, b, n, _ = columns(coef, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    residual = to_rows(x_next, dtype) - (a * to_rows(x, dtype) + b * velocity)
    scale = grad.unsqueeze(1) / (n * n)
    if mean_reduction:
        scale = scale / max(residual.shape[1], 1)
    dmean = torch.where(n > 0, residual * scale, 0.0)

    def emit(needed: bool, tensor: Tensor | None, factor: Tensor | float) -> Tensor:
        if not needed or tensor is None:
            return x.new_empty(0)
        return (dmean * factor).to(tensor.dtype).reshape(tensor.shape)

    share = 1.0 if v_uncond is None else guidance
    return (
        emit(need_x, x, a),
        emit(need_v, v, b * share),
        emit(need_x_next, x_next, -1.0),
        emit(need_v_uncond, v_uncond, b * (1.0 - guidance)),
    )


def _fake(x: Tensor, v: Tensor, x_next: Tensor, coef: Tensor, *_: object) -> Tensor:
    return coef.new_empty(x.shape[0])


def _fake_backward(
    grad: Tensor,
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
    " bool mean_reduction) -> Tensor",
    sde_logprob_reference,
    _fake,
)
_op_backward = define(
    "sde_logprob_backward(Tensor grad, Tensor x, Tensor v, Tensor x_next, Tensor coef,"
    " Tensor? v_uncond, float guidance, bool mean_reduction, bool need_x, bool need_v,"
    " bool need_x_next, bool need_v_uncond) -> (Tensor, Tensor, Tensor, Tensor)",
    sde_logprob_backward_reference,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, v, x_next, coef, v_uncond, guidance, mean_reduction = inputs
    ctx.save_for_backward(x, v, x_next, coef, v_uncond)
    ctx.guidance, ctx.mean_reduction = guidance, mean_reduction


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v, x_next, coef, v_uncond = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = (wanted[0], wanted[1], wanted[2], wanted[4])
    grads = _op_backward(
        grad, x, v, x_next, coef, v_uncond, ctx.guidance, ctx.mean_reduction, *needs
    )
    dx, dv, dx_next, dv_uncond = (
        g if needed else None for g, needed in zip(grads, needs, strict=True)
    )
    return dx, dv, dx_next, None, dv_uncond, None, None


differentiate("sde_logprob", _backward, _setup_context)


def sde_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Log-density ``[B]`` (nats) of ``x_next`` under ``N(a x + b v, n^2)``.

    Differentiable, once, in ``x``, ``v``, ``x_next`` and ``v_uncond``.

    Args:
        x, v, x_next: ``[B, ...]``, one shape; float32, bfloat16 and float16 may be mixed
            (arithmetic in float32), float64 may not.
        coef: ``[B, 4]`` float32 (float64 beside float64), columns (a, b, n, t).
        v_uncond: velocity without the prompt; ``v`` is then the one with it.
        guidance: scale w of ``v_uncond + w (v - v_uncond)``.
        reduction: "mean" per element, or "sum" over them.

    Returns:
        ``[B]`` in the dtype of ``coef``; 0 without gradient for rows with n = 0.

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
    return _op(
        x, v, x_next, coef, v_uncond, _checks.number("guidance", guidance), reduction == "mean"
    )
