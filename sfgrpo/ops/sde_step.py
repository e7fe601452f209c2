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

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, define_in_place, vectorise
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops._vmap import fold_into_rows
from sfgrpo.ops.philox import philox_normal_reference


def sde_step_reference(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step: int,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    with_x0: bool,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification: (x_next, logp, x0_hat, mean); empty ``[0]`` where not asked for.

    The mean a x + b v is kept in the precision of the arithmetic, everything else in x's dtype.
    """
    dtype = compute_dtype(x)
    a, b, n, t = columns(coef, dtype)
    start = to_rows(x, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    mean = a * start + b * velocity
    if noise is not None:
        eps = to_rows(noise, dtype)
    elif sample_ids is not None:
        eps = philox_normal_reference(mean.shape[1], seed, sample_ids, step, step_ids, dtype)
    else:
        raise RuntimeError("sde_step: without noise, sample_ids are needed")
    stored = (mean + n * eps).to(x.dtype)
    logp = gaussian_logp(stored.to(dtype), mean, n)
    x0_hat = (start - t * velocity).to(x.dtype).reshape(x.shape) if with_x0 else x.new_empty(0)
    mean = mean.reshape(x.shape) if with_mean else coef.new_empty(0)
    return stored.reshape(x.shape), logp, x0_hat, mean


def sde_step__reference(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step: int,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
    with_x0: bool,
) -> tuple[Tensor, Tensor]:
    """The specification of the op that writes x_next over ``x``: (logp, x0_hat or empty)."""
    x_next, logp, x0_hat, _ = sde_step_reference(
        x, v, coef, seed, sample_ids, step, step_ids, v_uncond, guidance, noise, with_x0, False
    )
    x.copy_(x_next)
    return logp, x0_hat


def _fake_in_place(x: Tensor, v: Tensor, coef: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_x0 = rest[7]
    return coef.new_empty(x.shape[0]), x.new_empty(x.shape if with_x0 else 0)


def _fake(x: Tensor, v: Tensor, coef: Tensor, *rest: object) -> tuple[Tensor, ...]:
    logp, x0_hat = _fake_in_place(x, v, coef, *rest[:-1])
    return x.new_empty(x.shape), logp, x0_hat, coef.new_empty(x.shape if rest[-1] else 0)


_OPERANDS = (
    "Tensor v, Tensor coef, SymInt seed, Tensor? sample_ids, SymInt step, Tensor? step_ids,"
    " Tensor? v_uncond, float guidance, Tensor? noise, bool with_x0"
)
_op = define(
    f"sde_step(Tensor x, {_OPERANDS}, bool with_mean) -> (Tensor, Tensor, Tensor, Tensor)",
    sde_step_reference,
    _fake,
)
_op_in_place = define_in_place(
    f"sde_step_(Tensor(a!) x, {_OPERANDS}) -> (Tensor, Tensor)",
    sde_step__reference,
    _fake_in_place,
)
vectorise("sde_step", fold_into_rows(_op))


class _Arguments(NamedTuple):
    """The operands of a step, checked and in the schemas' order."""

    x: Tensor
    v: Tensor
    coef: Tensor
    seed: int
    sample_ids: Tensor | None
    step: int
    step_ids: Tensor | None
    v_uncond: Tensor | None
    guidance: float
    noise: Tensor | None


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
) -> _Arguments:
    _checks.latents("x", x)
    _checks.like("v", v, x)
    _checks.coefficients(coef, x)
    if v_uncond is not None:
        _checks.like("v_uncond", v_uncond, x)
    step, steps = 0, None
    if noise is not None:
        _checks.like("noise", noise, x)
        seed, sample_ids = 0, None
    else:
        if seed is None or sample_ids is None or step_ids is None:
            raise ValueError("noise: got None, expected noise or all of seed, sample_ids, step_ids")
        seed = _checks.seed(seed)
        sample_ids = _checks.sample_ids(sample_ids, x.shape[0], x.device)
        step, steps = _checks.step_ids(step_ids, sample_ids)
    scale = _checks.number("guidance", guidance)
    return _Arguments(x, v, coef, seed, sample_ids, step, steps, v_uncond, scale, noise)


@torch.no_grad()
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
    arguments = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise)
    x_next, logp, _, _ = _op(*arguments, False, False)
    return x_next, logp


@torch.no_grad()
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
    arguments = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise)
    x_next, logp, x0_hat, _ = _op(*arguments, True, False)
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

    Arguments and errors as in ``sde_step``; ``x`` may share no memory with the other operands.
    Should an argument require grad while gradients are recorded, that is a RuntimeError.

    Returns:
        ``x`` itself, which now holds ``x_next``, and ``logp [B]``.
    """
    arguments = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise)
    _checks.writable("x", x)
    logp, _ = _op_in_place(*arguments, False)
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
    arguments = _checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise)
    _checks.writable("x", x)
    logp, x0_hat = _op_in_place(*arguments, True)
    return x, logp, x0_hat
