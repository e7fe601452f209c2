"""GPU kernel of `sfgrpo::philox_normal`: Gaussian noise with the bits of the reference.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) followed by
Box-Muller. Logarithm, sine and cosine are polynomials of our own, written with multiplications and
additions in a fixed order: the hardware's fast versions differ between vendors and generations.
A kernel that calls these functions must be launched with `enable_fp_fusion=False`, since a fused
multiply-add rounds once where the reference rounds twice (`sfgrpo.kernels.common.launch` does so).

Drawing noise is bound by the number of instructions, so powers of two stand where they cost none,
which changes no rounding, and `tl.fma` serves where the product is exact (by a power of two, or of
few digits), so that it rounds as the two operations of the reference do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import (
    contiguous,
    device_function,
    launch,
    split_int64,
    tile_at,
    tiling,
)
from sfgrpo.ops.philox import NoiseOperands

MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_0, KEY_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)
ULP = tl.constexpr(2.0**-23)


@device_function
def philox_rounds(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counters and keys."""
    for _ in tl.static_range(ROUNDS):  # pyright: ignore[reportGeneralTypeIssues]
        # Both halves of a product by one instruction, which Triton's own `philox_impl` has not.
        product0 = c0.to(tl.uint64) * MULTIPLIER_0
        product1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + KEY_0
        k1 = k1 + KEY_1
    return c0, c1, c2, c3


@device_function
def uniform(word, SCALE: tl.constexpr):
    """`SCALE` (a power of two) times a number in (0, 1]: the centre of a 32-bit word's bin."""
    return tl.fma(word.to(tl.float32), SCALE * 2.0**-32, SCALE * 2.0**-33)


@device_function
def squared_radius(u):
    """-2 ln u of a positive normal fp32 number: Cephes' logf, doubled."""
    bits = u.to(tl.int32, bitcast=True)
    # 0x3f3504f3 is sqrt(1/2): the mantissa comes out in [sqrt(1/2), sqrt(2)). The exponent stays
    # where it is in the word, as 2^23 times its value.
    exponent = (bits - 0x3F3504F3) & -0x800000
    e = exponent.to(tl.float32)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    y = 2 * 7.0376836292e-2 * f - 2 * 1.1514610310e-1
    y = y * f + 2 * 1.1676998740e-1
    y = y * f - 2 * 1.2420140846e-1
    y = y * f + 2 * 1.4249322787e-1
    y = y * f - 2 * 1.6668057665e-1
    y = y * f + 2 * 2.0000714765e-1
    y = y * f - 2 * 2.4999993993e-1
    y = y * f + 2 * 3.3333331174e-1
    y = y * f * z
    y = y + e * (2 * -2.12194440e-4 * ULP)
    y = y - z
    # ln 2's leading 9 bits times 6 bits: an exact product.
    return tl.fma(e, -2 * 0.693359375 * ULP, -1.0 * tl.fma(f, 2.0, y))


@device_function
def polar(r, u4):
    """r cos(2 pi u) and r sin(2 pi u), given 4 u in [0, 4]: whole quarter turns come off exactly.

    From quarter to quarter (cos, sin) is (c, s), (-s, c), (-c, -s), (s, -c), so the second half
    turn is the first with -r.
    """
    quarter = (u4 + 0.5).to(tl.int32)
    theta = (u4 - quarter.to(tl.float32)) * (6.2831855 / 4)
    z = theta * theta
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = (s * z - 1.6666654611e-1) * z * theta + theta
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = tl.fma(z, -0.5, (c * z + 4.166664568298827e-2) * z * z) + 1.0
    second_half = (quarter.to(tl.uint32) << 30) & 0x80000000
    r = (r.to(tl.uint32, bitcast=True) ^ second_half).to(tl.float32, bitcast=True)
    odd = (quarter & 1) != 0
    # Triton would make -s of 0 - s, whose zeros are positive; a product has the sign it should.
    return r * tl.where(odd, s * -1.0, c), r * tl.where(odd, c, s)


@device_function
def box_muller(word0, word1):
    """Two words of 32 random bits to two independent standard normals."""
    # sqrt_rn: the plain square root is an approximation on some targets.
    radius = tl.sqrt_rn(squared_radius(uniform(word0, 1.0)))
    return polar(radius, uniform(word1, 4.0))


@device_function
def normal_tile(counter, step_id, sample_id, seed_lo, seed_hi):
    """Standard normals `[R, 4 C]` of the elements `4 counter + (0, 1, 2, 3)`.

    `counter [1, C]` is the element index divided by four, `sample_id [R, 1]` is int64, `step_id
    [R, 1]` int64 or int32, of which the low 32 bits count; the seed comes as two int32 halves.
    """
    c0 = counter.to(tl.uint32)
    c1 = step_id.to(tl.uint32)
    c2 = sample_id.to(tl.uint32)
    c3 = (sample_id >> 32).to(tl.uint32)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = philox_rounds(c0, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    # Element order, so that a thread holds neighbours and stores them with one wide instruction.
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@device_function
def row_noise(
    sample_ids_ptr, step, step_ids_ptr, rows, exists, start, seed_lo, seed_hi, COLS: tl.constexpr
):
    """Noise `[ROWS, COLS]` of the columns from `start` on of rows with the given ids.

    Every row's step is `step` unless `step_ids_ptr` is given.
    """
    sample = tl.load(sample_ids_ptr + rows, mask=exists, other=0)
    if step_ids_ptr is not None:
        step = tl.load(step_ids_ptr + rows, mask=exists, other=0)
    else:
        step = tl.zeros_like(sample) + step
    counter = start // 4 + tl.arange(0, COLS // 4)
    return normal_tile(counter[None, :], step[:, None], sample[:, None], seed_lo, seed_hi)


@triton.jit(do_not_specialize=["batch", "step", "seed_lo", "seed_hi"])
def philox_normal_kernel(
    out_ptr,
    sample_ids_ptr,
    step,
    step_ids_ptr,
    batch,
    row_elements,
    chunks,
    seed_lo,
    seed_hi,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    rows, exists, _, start, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, ALIGN)
    noise = row_noise(
        sample_ids_ptr, step, step_ids_ptr, rows, exists, start, seed_lo, seed_hi, COLS
    )
    tl.store(out_ptr + offsets, noise.to(out_ptr.dtype.element_ty), mask=mask)


def philox_normal(o: NoiseOperands) -> Tensor:
    """Normals `[B, numel]` in `dtype`; int64 `sample_ids [B]`, one step or int64 `step_ids [B]`."""
    o = contiguous(o)
    batch = o.sample_ids.shape[0]
    out = torch.empty(batch, o.numel, dtype=o.dtype, device=o.sample_ids.device)
    if out.numel() == 0:
        return out
    cut = tiling(o.numel)
    launch(
        philox_normal_kernel,
        cut.programs(batch),
        out,
        o.sample_ids,
        split_int64(o.step)[0],
        o.step_ids,
        batch,
        o.numel,
        cut.chunks,
        *split_int64(o.seed),
        **cut.constants,
    )
    return out


def _example(numel: int, dtype: torch.dtype, *, steps: bool) -> Tensor:
    ids = torch.empty(16, dtype=torch.int64, device="meta")
    return philox_normal(NoiseOperands(numel, 0, ids, 3, ids if steps else None, dtype))


EXAMPLES = {
    "16x64x64 fp32": lambda: _example(65536, torch.float32, steps=False),
    "56 bf16, steps of rows": lambda: _example(56, torch.bfloat16, steps=True),
}
