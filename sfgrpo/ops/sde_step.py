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
from sfgrpo.ops._library import define
from sfgrpo.ops._rows import columns, compute_dtype, gaussian_logp, guided, to_rows
from sfgrpo.ops.philox import philox_normal_reference

_ARGUMENTS = (
    "(Tensor x, Tensor v, Tensor coef, int seed, Tensor? sample_ids, Tensor? step_ids,"
    " Tensor? v_uncond, float guidance, Tensor? noise)"
)


def sde_step_reference(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The specification of ``sde_step``, in the schema's argument order."""
    return sde_step_x0_reference(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise)[
        :2
    ]


def sde_step_x0_reference(
    x: Tensor,
    v: Tensor,
    coef: Tensor,
    seed: int,
    sample_ids: Tensor | None,
    step_ids: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of ``sde_step_x0``, in the schema's argument order."""
    dtype = compute_dtype(x)
    a, b, n, t = columns(coef, dtype)
    start = to_rows(x, dtype)
    velocity = guided(
        to_rows(v, dtype), None if v_uncond is None else to_rows(v_uncond, dtype), guidance
    )
    mean = a * start + b * velocity
    if noise is not None:
        eps = to_rows(noise, dtype)
    elif sample_ids is not None and step_ids is not None:
        eps = philox_normal_reference(mean.shape[1], seed, sample_ids, step_ids, dtype)
    else:
        raise RuntimeError("sde_step: without noise, sample_ids and step_ids are needed")
    stored = (mean + n * eps).to(x.dtype)
    logp = gaussian_logp(stored.to(dtype), mean, n)
    x0_hat = (start - t * velocity).to(x.dtype)
    return stored.reshape(x.shape), logp, x0_hat.reshape(x.shape)


def _fake_step(x: Tensor, v: Tensor, coef: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), coef.new_empty(x.shape[0])


def _fake_step_x0(x: Tensor, v: Tensor, coef: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), coef.new_empty(x.shape[0]), x.new_empty(x.shape)


_step = define(f"sde_step{_ARGUMENTS} -> (Tensor, Tensor)", sde_step_reference, _fake_step)
_step_x0 = define(
    f"sde_step_x0{_ARGUMENTS} -> (Tensor, Tensor, Tensor)", sde_step_x0_reference, _fake_step_x0
)


class _Arguments(NamedTuple):
    """The operands of a step, checked and in the schema's order."""

    x: Tensor
    v: Tensor
    coef: Tensor
    seed: int
    sample_ids: Tensor | None
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
    steps = None
    if noise is not None:
        _checks.like("noise", noise, x)
        seed, sample_ids = 0, None
    else:
        if seed is None or sample_ids is None or step_ids is None:
            raise ValueError("noise: got None, expected noise or all of seed, sample_ids, step_ids")
        seed = _checks.seed(seed)
        sample_ids = _checks.sample_ids(sample_ids, x.shape[0], x.device)
        steps = _checks.step_ids(step_ids, sample_ids)
    return _Arguments(
        x,
        v,
        coef,
        seed,
        sample_ids,
        steps,
        v_uncond,
        _checks.number("guidance", guidance),
        noise,
    )


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
    return _step(*_checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise))


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

    Arguments and errors as in ``sde_step``.

    Returns:
        ``(x_next, logp, x0_hat)``, ``x0_hat`` in the shape and dtype of ``x``.
    """
    return _step_x0(*_checked(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise))
