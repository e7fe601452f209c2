"""Clean estimate of a rectified flow's state: ``x0_hat = E[x_0 | x_t] = x_t - t v``.

Tweedie's projection for x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0; one Euler step to t = 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, define_in_place, differentiate, vectorise
from sfgrpo.ops._rows import compute_dtype, to_rows
from sfgrpo.ops._vmap import fold_into_rows


def tweedie_reference(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> Tensor:
    """The specification of ``tweedie``; PyTorch's autograd can differentiate it.

    Every row's time is ``time``, unless ``t [B]`` names one for each.

    Raises:
        RuntimeError: on the CPU, a time is not in [0, 1].
    """
    dtype = compute_dtype(x)
    times = x.new_full((x.shape[0],), time, dtype=dtype) if t is None else t
    if times.device.type == "cpu":
        wrong = ~((times >= 0) & (times <= 1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RuntimeError(f"t: t of row {row} is {float(times[row]):g}; expected 0 <= t <= 1")
    x0_hat = to_rows(x, dtype) - times.to(dtype).unsqueeze(1) * to_rows(v, dtype)
    return x0_hat.to(x.dtype).reshape(x.shape)


def tweedie__reference(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> None:
    """The specification of the op that writes ``x - t v`` over ``v``, in v's dtype.

    The difference is taken in x's precision class and rounded once, to the dtype of ``v``.
    """
    exact = x.to(compute_dtype(x))
    v.copy_(tweedie_reference(exact, v, t, time))


def _fake(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_in_place(x: Tensor, v: Tensor, t: Tensor | None, time: float) -> None:
    return None


_op = define(
    "tweedie(Tensor x, Tensor v, Tensor? t, float time) -> Tensor", tweedie_reference, _fake
)
_op_in_place = define_in_place(
    "tweedie_(Tensor x, Tensor(a!) v, Tensor? t, float time) -> ()",
    tweedie__reference,
    _fake_in_place,
)
vectorise("tweedie", fold_into_rows(_op))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, v, t, ctx.time = inputs
    ctx.save_for_backward(t)
    ctx.v_dtype = v.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (t,) = ctx.saved_tensors
    need_x, need_v = ctx.needs_input_grad[:2]
    times = ctx.time if t is None else t.reshape(-1, *(1,) * (grad.ndim - 1))
    grad_v = (grad * -times).to(ctx.v_dtype) if need_v else None
    return grad if need_x else None, grad_v, None, None


_call = differentiate("tweedie", _backward, _setup_context)


def _times(x: Tensor, v: Tensor, t: float | Tensor) -> tuple[Tensor | None, float]:
    """Check the operands of both forms; the time as the schemas take it."""
    _checks.latents("x", x)
    _checks.like("v", v, x)
    if isinstance(t, Tensor):
        _checks.per_row("t", t, x)
        _checks.no_grad(t=t)
        return t, 0.0
    if not 0.0 <= _checks.number("t", t) <= 1.0:
        raise ValueError(f"t: got {t}, expected 0 <= t <= 1")
    return None, float(t)


def tweedie(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """``x - t v``: the clean latent a velocity predicts.  Differentiable in ``x`` and ``v``.

    Traffic per element (fp32): 12 bytes: reads x, v; writes x0_hat.

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
    return _call(x, v, *_times(x, v, t))


def tweedie_(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """``tweedie`` that writes the clean estimate over ``v``, rounded to the dtype of ``v``.

    Traffic per element (fp32): 12 bytes: reads x, v; writes v.

    Arguments and errors as in ``tweedie``; ``v`` may share no memory with ``x``.  Should ``x`` or
    ``v`` require grad while gradients are recorded, that is a RuntimeError.

    Returns:
        ``v`` itself.
    """
    times = _times(x, v, t)
    _checks.writable("v", v)
    _op_in_place(x, v, *times)
    return v
