"""Counter-based Gaussian noise with the same bits on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turned into
normals by Box-Muller:

    counter = (element // 4, step, sample_lo, sample_hi),   key = (seed_lo, seed_hi)
    u  = float(r) 2^-32 + 2^-33                             in (0, 1]
    z0 = sqrt(-2 ln u1) cos(2 pi u2),   z1 = sqrt(-2 ln u1) sin(2 pi u2)

so the noise of a sample depends on (seed, sample, step, element) and on nothing else: not on the
batch, the rank, the device or the instruction set.  For the last three, ln, sin and cos are the
polynomials below (Cephes' logf, sinf, cosf by S. Moshier) instead of the platform's, evaluated
in float32 with separate multiplications and additions in the written order: every backend that
contracts nothing into fused multiply-adds returns exactly these bits.

This file is the specification; it computes 32-bit words in masked int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfgrpo.ops import _checks
from sfgrpo.ops._library import define, vectorise
from sfgrpo.ops._vmap import fold_into_rows

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

SQRT_HALF_BITS = 0x3F3504F3
LN_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
TWO_PI = 6.2831855


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words.

    Args:
        counter: four broadcastable int64 tensors with values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product wraps modulo 2^64, which keeps all of its 64 bits; the mask undoes the
        # sign extension of the arithmetic shift.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return [c0, c1, c2, c3]


def uniform(word: Tensor) -> Tensor:
    """32-bit words in int64 -> float32 in (0, 1]: rounded to nearest, then scaled exactly."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def natural_log(u: Tensor) -> Tensor:
    """ln of positive normal float32, within 1 ulp of the true value on (0, 1]."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    z = f * f
    y = torch.full_like(f, LN_POLYNOMIAL[0])
    for coefficient in LN_POLYNOMIAL[1:]:
        y = y * f + coefficient
    y = y * f * z
    y = y + e * LN2_LOW
    y = y - 0.5 * z
    return (f + y) + e * LN2_HIGH


def cos_sin_2pi(u: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of 2 pi u for float32 u in [0, 1], reduced exactly to [-pi/4, pi/4]."""
    quarter = torch.floor(4.0 * u + 0.5)
    theta = (u - 0.25 * quarter) * TWO_PI
    z = theta * theta
    s = ((SIN_POLYNOMIAL[0] * z + SIN_POLYNOMIAL[1]) * z + SIN_POLYNOMIAL[2]) * z * theta + theta
    c = (COS_POLYNOMIAL[0] * z + COS_POLYNOMIAL[1]) * z + COS_POLYNOMIAL[2]
    c = c * z * z - 0.5 * z + 1.0
    quadrant = quarter.to(torch.int32) & 3
    odd = (quadrant & 1) == 1
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = torch.where(quadrant >= 2, -sin, sin)
    return cos, sin


def box_muller(word1: Tensor, word2: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words -> two independent standard normals (float32)."""
    # Through float64 the square root is correctly rounded; PyTorch's float32 one is not (MKL).
    radius = (-2.0 * natural_log(uniform(word1))).double().sqrt().float()
    cos, sin = cos_sin_2pi(uniform(word2))
    return radius * cos, radius * sin


class NoiseOperands(NamedTuple):
    """What the generator takes."""

    numel: int
    """Elements of a row."""
    seed: int
    sample_ids: Tensor
    """int64 ``[B]``."""
    step: int
    """Of every row, unless there are ``step_ids``."""
    step_ids: Tensor | None
    """int64 ``[B]``."""
    dtype: torch.dtype


def philox_normal_reference(o: NoiseOperands) -> Tensor:
    """Standard normals ``[B, numel]``: the specification.

    Computed in float32 for every ``dtype``, then rounded (or, for float64, widened) to it.
    """
    device = o.sample_ids.device
    if device.type == "mps":  # has no float64, which the square root needs
        steps_cpu = None if o.step_ids is None else o.step_ids.cpu()
        on_cpu = o._replace(sample_ids=o.sample_ids.cpu(), step_ids=steps_cpu)
        return philox_normal_reference(on_cpu).to(device)
    steps = torch.full_like(o.sample_ids, o.step) if o.step_ids is None else o.step_ids
    quads = (o.numel + 3) // 4
    element = torch.arange(quads, dtype=torch.int64, device=device).unsqueeze(0)
    row_step = (steps & MASK).unsqueeze(1)
    sample = o.sample_ids.unsqueeze(1)
    counter = (element, row_step, sample & MASK, (sample >> 32) & MASK)
    r0, r1, r2, r3 = philox4x32(counter, (o.seed & MASK, (o.seed >> 32) & MASK))
    z = torch.stack((*box_muller(r0, r1), *box_muller(r2, r3)), dim=2)
    rows = z.reshape(o.sample_ids.shape[0], 4 * quads)
    return rows[:, : o.numel].to(o.dtype).contiguous()


def _fake(o: NoiseOperands) -> Tensor:
    return o.sample_ids.new_empty((o.sample_ids.shape[0], o.numel), dtype=o.dtype)


_op = define("philox_normal", NoiseOperands, philox_normal_reference, _fake)
vectorise("philox_normal", fold_into_rows(_op))


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    sample_ids: Tensor,
    step_ids: int | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals whose bits depend on (seed, sample id, step id, element) only.

    Traffic per element (fp32): 4 bytes: writes the result.

    Args:
        shape: shape of one sample, without the batch; at most 2**34 elements.
        seed: key of the generator, in [0, 2**63).
        sample_ids: int64 ``[B]``, one identity per row; its device is the result's.
        step_ids: an int in [0, 2**32) for all rows, or int64 ``[B]``.
        dtype: float32, bfloat16, float16 or float64 (the float32 values, widened).

    Returns:
        ``[B, *shape]`` in ``dtype``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or range.
    """
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16, float16 or float64")
    numel = math.prod(shape)
    if min(shape, default=0) < 0 or numel > 2**34:
        raise ValueError(f"shape: got {tuple(shape)}, expected sizes >= 0, at most 2**34 elements")
    _checks.sample_ids(sample_ids)
    step, steps = _checks.steps(step_ids)
    if steps is not None:
        _checks.step_ids(steps, sample_ids)
    o = NoiseOperands(numel, _checks.seed(seed), sample_ids, step, steps, dtype)
    normals = _op(*o)
    return normals if len(shape) == 1 else normals.reshape(sample_ids.shape[0], *shape)
