"""One stochastic step of any sampler, its noise and its log-density in one pass.

Every sampler of this field is affine in (x_t, v) per row (docs of ``sfgrpo.sde``):

    x_next = a x + b v + n eps,     eps ~ N(0, I)
    logp   = -mean_D (x_next - a x - b v)^2 / (2 n^2) - ln n - ln(2 pi) / 2

with v = v_uncond + guidance (v - v_uncond) under classifier-free guidance.  The log-density is
that of the x_next which is STORED, after rounding to the dtype of x: sampling and scoring see the
same number.  Flow-GRPO (arXiv 2505.05470) introduced the step, with sampler-specific formulas.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sfgrpo.ops import _checks, _overlap
from sfgrpo.ops._calls import in_place, without_gradient
from sfgrpo.ops._library import define, vectorise
from sfgrpo.ops._remember import remembered
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops._vmap import fold_into_rows
from sfgrpo.ops.philox import NoiseOperands, philox_normal_reference


class StepOperands(NamedTuple):
    """What a step takes; ``sde_step_`` does without the last field, since it writes over ``x``."""

    x: Tensor
    """``[B, ...]``."""
    v: Tensor
    """Velocity, shape of ``x``."""
    coef: Tensor
    """``[B, 4]``: (a, b, n, t) of the rows."""
    seed: int = 0
    sample_ids: Tensor | None = None
    """int64 ``[B]``; with the seed and the step the identity of the noise, needed without it."""
    step: int = 0
    """Of every row, unless there are ``step_ids``."""
    step_ids: Tensor | None = None
    """int64 ``[B]``."""
    v_uncond: Tensor | None = None
    """Velocity without the prompt, shape of ``x``."""
    guidance: float = 1.0
    noise: Tensor | None = None
    """eps, shape of ``x``."""
    with_x0: bool = False
    """Whether the clean estimate is wanted."""
    with_mean: bool = False
    """Whether the transition's mean is."""


def sde_step_reference(o: StepOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification: (x_next, logp, x0_hat, mean); empty ``[0]`` where not asked for.

    The mean a x + b v is kept in the precision of the arithmetic, everything else in x's dtype.
    """
    x, dtype = o.x, compute_dtype(o.x)
    a, b, n, t = columns(o.coef, dtype)
    start = to_rows(x, dtype)
    velocity = guided(o.v, o.v_uncond, o.guidance, dtype)
    mean = a * start + b * velocity
    if o.noise is not None:
        eps = to_rows(o.noise, dtype)
    elif o.sample_ids is not None:
        elements = mean.shape[1]
        eps = philox_normal_reference(
            NoiseOperands(elements, o.seed, o.sample_ids, o.step, o.step_ids, dtype)
        )
    else:
        raise RuntimeError("sde_step: without noise, sample_ids are needed")
    stored = (mean + n * eps).to(x.dtype)
    logp = gaussian_logp(stored.to(dtype), mean, n)
    x0_hat = (start - t * velocity).to(x.dtype).reshape(x.shape) if o.with_x0 else x.new_empty(0)
    mean = mean.reshape(x.shape) if o.with_mean else o.coef.new_empty(0)
    return stored.reshape(x.shape), logp, x0_hat, mean


def sde_step__reference(o: StepOperands) -> tuple[Tensor, Tensor]:
    """The specification of the op that writes x_next over ``x``: (logp, x0_hat or empty)."""
    x_next, logp, x0_hat, _ = sde_step_reference(o)
    o.x.copy_(x_next)
    return logp, x0_hat


def _fake_in_place(o: StepOperands) -> tuple[Tensor, Tensor]:
    return o.coef.new_empty(o.x.shape[0]), o.x.new_empty(o.x.shape if o.with_x0 else 0)


def _fake(o: StepOperands) -> tuple[Tensor, ...]:
    mean = o.coef.new_empty(o.x.shape if o.with_mean else 0)
    return o.x.new_empty(o.x.shape), *_fake_in_place(o), mean


_op = define("sde_step", StepOperands, sde_step_reference, _fake)
_call = without_gradient(_op)
define(
    "sde_step_",
    StepOperands,
    sde_step__reference,
    _fake_in_place,
    written=("x",),
    without=("with_mean",),
)
_call_in_place = in_place("sde_step_")
vectorise("sde_step", fold_into_rows(_op))


@remembered
def _accepted(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    sample_ids: Tensor | None,
    steps: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
) -> float:
    """The guidance's scale; either there is noise or there are ids."""
    _checks.latents("x", x)
    _checks.like("v", v, x)
    _checks.coefficients(coef, x)
    if v_uncond is not None:
        _checks.like("v_uncond", v_uncond, x)
    if noise is not None:
        _checks.like("noise", noise, x)
    if sample_ids is not None:
        _checks.sample_ids(sample_ids, x.shape[0], x.device)
        if steps is not None:
            _checks.step_ids(steps, sample_ids)
    return _checks.number("guidance", guidance)


def _checked(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int | None,
    sample_ids: Tensor | None,
    step_ids: int | Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    with_x0: bool,
) -> StepOperands:
    step, steps = 0, None
    if noise is not None:
        seed, sample_ids = 0, None
    else:
        if seed is None or sample_ids is None or step_ids is None:
            raise ValueError("noise: got None, expected noise or all of seed, sample_ids, step_ids")
        # These change from call to call, so they are no part of a kind.
        seed = _checks.seed(seed)
        step, steps = _checks.steps(step_ids)
    scale = _accepted(x, v, coef, sample_ids, steps, v_uncond, guidance, noise)
    return StepOperands(x, v, coef, seed, sample_ids, step, steps, v_uncond, scale, noise, with_x0)


def sde_step(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step_ids: int | Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample ``x_next = a x + b v + n eps`` and score it.  Not differentiable: ``sde_logprob`` is.

    Traffic per element (fp32): 12 bytes: reads x, v; writes x_next.  Guidance and given noise add
    the tensor they read.

    Args:
        x: latents ``[B, ...]``; float32, bfloat16, float16 (arithmetic in float32) or, with
            every other tensor, float64.
        v: predicted velocity, shape of ``x``, any of the dtypes.
        coef: ``[B, 4]`` float32 (float64 beside float64), columns (a, b, n, t) of each row's step.
        seed, sample_ids, step_ids: identity of the noise, see ``philox_normal``.
        v_uncond: velocity without the prompt; ``v`` is then the one with it.
        guidance: scale w of ``v_uncond + w (v - v_uncond)``.
        noise: use this eps ``[B, ...]`` instead of generating one; the three ids are then ignored.

    Returns:
        ``x_next`` in the shape and dtype of ``x``, and ``logp [B]`` (mean per element, nats) in
        the dtype of ``coef``.  Rows with n = 0 give ``x_next = a x + b v`` and logp 0 by rule.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device, or the noise is not determined.
        RuntimeError: on the CPU, a coefficient is not finite, n < 0 or t outside [0, 1].
    """
    o = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, False)
    x_next, logp, _, _ = _call(*o)
    return x_next, logp


def sde_step_x0(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step_ids: int | Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sde_step`` and, from the same pass, the clean estimate ``x0_hat = x - t v``.

    Traffic per element (fp32): 16 bytes: reads x, v; writes x_next, x0_hat.

    Arguments and errors as in ``sde_step``.

    Returns:
        ``(x_next, logp, x0_hat)``, ``x0_hat`` in the shape and dtype of ``x``.
    """
    o = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, True)
    x_next, logp, x0_hat, _ = _call(*o)
    return x_next, logp, x0_hat


def sde_step_(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step_ids: int | Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sde_step`` that writes ``x_next`` over ``x``: nothing of the latents' size is allocated.

    Traffic per element (fp32): 12 bytes: reads x, v; writes x.

    Arguments and errors as in ``sde_step``; should ``x`` overlap with another operand, other than
    element by element, that is a ValueError, and should an argument require grad while gradients
    are recorded, a RuntimeError.

    Returns:
        ``x`` itself, which now holds ``x_next``, and ``logp [B]``.
    """
    o = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, False)
    _overlap.overwritable(o, ("x",))
    logp, _ = _call_in_place(o[:-1])
    return x, logp


def sde_step_x0_(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    step_ids: int | Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sde_step_`` and, from the same pass, the clean estimate of the state that was in ``x``.

    Traffic per element (fp32): 16 bytes: reads x, v; writes x, x0_hat.

    Arguments and errors as in ``sde_step_``.

    Returns:
        ``x`` itself, which now holds ``x_next``; ``logp [B]``; ``x0_hat`` in the dtype of ``x``.
    """
    o = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, True)
    _overlap.overwritable(o, ("x",))
    logp, x0_hat = _call_in_place(o[:-1])
    return x, logp, x0_hat
