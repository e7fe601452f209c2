"""Clean estimate of a rectified flow's state: ``x0_hat = E[x_0 | x_t] = x_t - t v``.

Tweedie's projection for x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0; one Euler step to t = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, differentiate
from sfgrpo.ops._rows import compute_dtype, to_rows


def tweedie_reference(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The specification of ``tweedie``; PyTorch's autograd can differentiate it.

    Raises:
        RuntimeError: on the CPU, a time is not in [0, 1].
    """
    if t.device.type == "cpu":
        wrong = ~((t >= 0) & (t <= 1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RuntimeError(f"t: t of row {row} is {float(t[row]):g}; expected 0 <= t <= 1")
    dtype = compute_dtype(x)
    x0_hat = to_rows(x, dtype) - t.to(dtype).unsqueeze(1) * to_rows(v, dtype)
    return x0_hat.to(x.dtype).reshape(x.shape)


def _fake(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_op = define("tweedie(Tensor x, Tensor v, Tensor t) -> Tensor", tweedie_reference, _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, v, t = inputs
    ctx.save_for_backward(t)
    ctx.v_dtype = v.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (t,) = ctx.saved_tensors
    need_x, need_v, _ = ctx.needs_input_grad
    times = t.reshape(-1, *(1,) * (grad.ndim - 1))
    grad_v = (-times * grad).to(ctx.v_dtype) if need_v else None
    return grad if need_x else None, grad_v, None


differentiate("tweedie", _backward, _setup_context)


def tweedie(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """``x - t v``: the clean latent a velocity predicts.  Differentiable in ``x`` and ``v``.

    Args:
        x: latents ``[B, ...]``.
        v: velocity, shape of ``x``; dtypes may differ as in ``sde_step``.
        t: time in [0, 1], one number or ``[B]`` float32 (float64 beside float64).

    Returns:
        ``x0_hat`` in the shape and dtype of ``x``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape or device, a number outside [0, 1], or ``t`` requires grad.
        RuntimeError: on the CPU, a time of a tensor is outside [0, 1].
    """
    _checks.latents("x", x)
    _checks.like("v", v, x)
    if isinstance(t, Tensor):
        _checks.per_row("t", t, x)
        _checks.no_grad(t=t)
        times = t
    else:
        if not 0.0 <= _checks.number("t", t) <= 1.0:
            raise ValueError(f"t: got {t}, expected 0 <= t <= 1")
        times = torch.full((x.shape[0],), t, dtype=_checks.row_dtype(x), device=x.device)
    return _op(x, v, times)
