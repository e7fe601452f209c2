"""Clean estimate of a rectified flow's state: ``x0_hat = E[x_0 | x_t] = x_t - t v``.

Tweedie's projection for x_t = (1 - t) x_0 + t x_1 and v = x_1 - x_0; one Euler step to t = 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sfgrpo.ops import _checks, _overlap
from sfgrpo.ops._calls import differentiate, in_place
from sfgrpo.ops._library import define, vectorise
from sfgrpo.ops._remember import remembered
from sfgrpo.ops._rows import compute_dtype, to_rows
from sfgrpo.ops._vmap import fold_into_rows


class TweedieOperands(NamedTuple):
    """What both forms take; the one in place writes over ``v``."""

    x: Tensor
    """``[B, ...]``."""
    v: Tensor
    """Velocity, shape of ``x``."""
    t: Tensor | None
    """``[B]``: the rows' times."""
    time: float
    """Of every row, unless there is ``t``."""


def tweedie_reference(o: TweedieOperands) -> Tensor:
    """The specification of ``tweedie``; PyTorch's autograd can differentiate it.

    Raises:
        RuntimeError: on the CPU, a time is not in [0, 1].
    """
    x, dtype = o.x, compute_dtype(o.x)
    times = x.new_full((x.shape[0],), o.time, dtype=dtype) if o.t is None else o.t
    if times.device.type == "cpu":
        wrong = ~((times >= 0) & (times <= 1))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RuntimeError(f"t: t of row {row} is {float(times[row]):g}; expected 0 <= t <= 1")
    x0_hat = to_rows(x, dtype) - times.to(dtype).unsqueeze(1) * to_rows(o.v, dtype)
    return x0_hat.to(x.dtype).reshape(x.shape)


def tweedie__reference(o: TweedieOperands) -> None:
    """The specification of the op that writes ``x - t v`` over ``v``, in v's dtype.

    The difference is taken in x's precision class and rounded once, to the dtype of ``v``.
    """
    o.v.copy_(tweedie_reference(o._replace(x=o.x.to(compute_dtype(o.x)))))


_op = define("tweedie", TweedieOperands, tweedie_reference, lambda o: o.x.new_empty(o.x.shape))
define("tweedie_", TweedieOperands, tweedie__reference, written=("v",))
_call_in_place = in_place("tweedie_")
vectorise("tweedie", fold_into_rows(_op))


def _setup_context(ctx: Any, o: TweedieOperands, output: Tensor) -> None:
    ctx.time, ctx.v_dtype = o.time, o.v.dtype
    ctx.save_for_backward(o.t)


def _backward(ctx: Any, needed: dict[str, bool], grad: Tensor) -> dict[str, Tensor | None]:
    (t,) = ctx.saved_tensors
    times = ctx.time if t is None else t.reshape(-1, *(1,) * (grad.ndim - 1))
    return {
        "x": grad if needed["x"] else None,
        "v": (grad * -times).to(ctx.v_dtype) if needed["v"] else None,
    }


_call = differentiate("tweedie", _backward, _setup_context, ("x", "v"))


@remembered
def _accepted(x: Tensor, v: Tensor, t: Tensor | None) -> bool:
    _checks.latents("x", x)
    _checks.like("v", v, x)
    if t is not None:
        _checks.per_row("t", t, x)
        _checks.no_grad(t=t)
    return True


def _checked(x: Tensor, v: Tensor, t: float | Tensor) -> TweedieOperands:
    if isinstance(t, Tensor):
        _accepted(x, v, t)
        return TweedieOperands(x, v, t, 0.0)
    _accepted(x, v, None)
    time = _checks.number("t", t)
    if not 0.0 <= time <= 1.0:
        raise ValueError(f"t: got {t}, expected 0 <= t <= 1")
    return TweedieOperands(x, v, None, time)


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
    return _call(_checked(x, v, t))


def tweedie_(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """``tweedie`` that writes the clean estimate over ``v``, rounded to the dtype of ``v``.

    Traffic per element (fp32): 12 bytes: reads x, v; writes v.

    Arguments and errors as in ``tweedie``; should ``v`` overlap with another operand, other than
    element by element, that is a ValueError, and should ``x`` or ``v`` require grad while gradients
    are recorded, a RuntimeError.

    Returns:
        ``v`` itself.
    """
    o = _checked(x, v, t)
    _overlap.overwritable(o, ("v",))
    _call_in_place(o)
    return v
