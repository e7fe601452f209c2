"""What the kernels share: how rows are cut into tiles, what they load, how they are launched.

A kernel sees `B` rows of `D` contiguous elements. A program works on a tile of `rows` x `cols`;
the shape of the tile depends on `D` alone, so the bits of a row's result depend neither on how
many rows stand beside it nor on the device's number of processors.

Every op is one launch and never makes the host wait, with one exception: while a CUDA graph is
being captured, an op whose rows span several programs has a fill of its counters beside its kernel
(finish.py). Only operands whose elements are not contiguous, or which start elsewhere than at a
multiple of 16 bytes, cost more: they are copied first, and copied back if the op writes over them.
A kernel would read the latter one element at a time, and add in another order than it usually does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG_SQRT_2PI = tl.constexpr(0.9189385332046727)

VECTOR = tl.constexpr(4)
"""Neighbours that a thread loads and stores at once: 16 bytes of fp32, 8 of bf16. Were it 16 bytes
of either, a kernel that reads both would send one through shared memory to meet the other."""

ALIGNMENT = 16
"""Bytes; Triton compiles a kernel of its own for tensors that start elsewhere."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Record = TypeVar("Record", bound=NamedTuple)


@dataclass(frozen=True)
class LaunchParameters:
    """Sizes of a launch; one setting serves every kernel here, all of them bound by memory."""

    tile_elements: int = 1024
    """Elements per program: 8 per thread, i.e. two 16-byte accesses of fp32 and one of bf16. A
    latent of 16 x 64 x 64 makes 64 programs, so that two rows already fill a large GPU."""

    min_cols: int = 16
    """Narrowest tile: rows of a few elements still share a program with at most 63 others."""

    num_warps: int = 4
    """128 threads: with 8 elements each, Philox and Box-Muller stay clear of register spills."""


LAUNCH = LaunchParameters()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` things."""
    return -(-count // size)


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a function that kernels call (whose type says that nobody may call it)."""
    return triton.jit(function)


@dataclass(frozen=True)
class Tiling:
    """How `D` elements per row are cut: `rows` x `cols` per program, `chunks` programs per row."""

    rows: int
    cols: int
    chunks: int
    align: int
    """Every row starts at a multiple of so many elements: 1, 2 or 4."""

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        return {"ROWS": self.rows, "COLS": self.cols, "ALIGN": self.align}

    def programs(self, batch: int) -> tuple[int]:
        """The grid. One axis only: the second one of CUDA ends at 65,535."""
        return (ceil_div(batch, self.rows) * self.chunks,)


def tiling(row_elements: int) -> Tiling:
    """The tiling of rows of `row_elements` elements; empty rows still get a program."""
    padded = max(1 << (row_elements - 1).bit_length(), LAUNCH.min_cols)
    cols = min(padded, LAUNCH.tile_elements)
    chunks = max(ceil_div(row_elements, cols), 1)
    return Tiling(LAUNCH.tile_elements // cols, cols, chunks, math.gcd(row_elements, VECTOR.value))


def launch(
    kernel: Any,
    grid: tuple[int],
    *arguments: object,
    num_warps: int = LAUNCH.num_warps,
    **constants: object,
) -> None:
    """Run `kernel` on the device of its first tensor argument.

    Multiply-adds are never fused: the noise must have the reference's bits, and elsewhere the
    kernels wait for memory anyway.
    """
    with on_device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    if tensor.device.type in ("cpu", "meta"):
        return nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def contiguous(o: Record, *, strided: tuple[str, ...] = ("coef",)) -> Record:
    """The operands with contiguous, aligned rows, but for those read by their strides.

    Raises:
        TypeError: for a floating dtype that the kernels do not compute in (float64).
    """
    return o._make(
        _contiguous(value) if isinstance(value, Tensor) and field not in strided else value
        for field, value in zip(o._fields, o, strict=True)
    )


def _contiguous(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"the GPU kernels take float32, bfloat16 and float16 tensors, got {tensor.dtype}: "
            "convert it, or compute on the CPU, where float64 is served"
        )
    if tensor.dim() > 1 and tensor.data_ptr() % ALIGNMENT and tensor[:1].numel() % 2 == 0:
        # Rows of an odd length are read one element at a time in any case.
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def coefficient_table(coef: Tensor) -> tuple[Tensor, int]:
    """`coef [B, 4]` and the distance of its rows: 0 for one row that serves all (`expand`)."""
    table = coef if coef.stride(1) == 1 else _contiguous(coef)
    return table, table.stride(0)


def copy_back(target: Tensor | None, written: Tensor | None) -> None:
    """Finish an op in place whose operand had to be made contiguous."""
    if target is not None and written is not None and written is not target:
        target.copy_(written)


def rows_like(row_elements: int, dtype: torch.dtype = torch.float32, batch: int = 16) -> Tensor:
    """Rows without storage: what the launches listed for `sfgrpo.kernels.aot` are made of."""
    return torch.empty(batch, row_elements, dtype=dtype, device="meta")


def split_int64(number: int) -> tuple[int, int]:
    """64 bits as two signed 32-bit halves (low, high), the form of a kernel argument."""
    halves = (number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF)
    low, high = (half - (1 << 32) if half >= 1 << 31 else half for half in halves)
    return low, high


@device_function
def tile_at(
    batch,
    row_elements,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Indices of this program's tile.

    Returns the rows `[ROWS]` (int64) and whether they exist, the chunk of the row, the first
    column, the flat offsets `[ROWS, COLS]` (int64) and which of them exist.
    """
    # Unsigned, as dividing signed numbers takes half as long again.
    program = tl.program_id(0).to(tl.uint32)
    group = program // tl.cast(chunks, tl.uint32)
    chunk = (program - group * tl.cast(chunks, tl.uint32)).to(tl.int32)
    rows = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = chunk.to(tl.int64) * COLS
    cols = start + tl.arange(0, COLS)
    exists = rows < batch
    if ALIGN > 1:
        # What Triton cannot know of a length that is no multiple of 16.
        length = tl.multiple_of(tl.cast(row_elements, tl.int64), ALIGN)
        offsets = tl.max_contiguous(rows[:, None] * length + cols[None, :], (1, VECTOR))
        mask = exists[:, None] & (cols < length)[None, :]
    else:
        offsets = rows[:, None] * row_elements + cols[None, :]
        mask = exists[:, None] & (cols < row_elements)[None, :]
    return rows, exists, chunk, start, offsets, mask


@device_function
def load_float(pointer, offsets, mask):
    """Elements as fp32, zero where `mask` is false."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@device_function
def load_coefficients(coef_ptr, coef_stride, rows, exists):
    """Columns (a, b, n, t) of the coefficient table; `n = 0` for rows that do not exist."""
    coef_ptr += rows * coef_stride
    a = tl.load(coef_ptr, mask=exists, other=0.0)
    b = tl.load(coef_ptr + 1, mask=exists, other=0.0)
    n = tl.load(coef_ptr + 2, mask=exists, other=0.0)
    t = tl.load(coef_ptr + 3, mask=exists, other=0.0)
    return a, b, n, t


@device_function
def store_tile(pointer, in_place_ptr, offsets, mask, tile):
    """Store a tile in the dtype behind `pointer`, or over an operand if `pointer` is None.

    Then no thread may store before every thread of the program has loaded: the compiler is free to
    spread a tile over the threads in one way for loads and in another for stores.
    """
    if pointer is None:
        tl.debug_barrier()
        pointer = in_place_ptr
    stored = tile.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets, stored, mask=mask)
    return stored


@device_function
def load_velocity(v_ptr, v_uncond_ptr, guidance, offsets, mask):
    """The velocity, guided as v_uncond + guidance (v - v_uncond) if `v_uncond_ptr` is given."""
    v = load_float(v_ptr, offsets, mask)
    if v_uncond_ptr is not None:
        v_uncond = load_float(v_uncond_ptr, offsets, mask)
        v = v_uncond + guidance * (v - v_uncond)
    return v


@device_function
def gaussian_logp(square_sum, n, row_elements, scale):
    """Log-density per element times `scale`; 0 by rule for a row without noise or elements."""
    noisy = (n > 0.0) & (row_elements > 0)
    safe_n = tl.where(noisy, n, 1.0)
    mean_square = square_sum / tl.maximum(row_elements, 1)
    logp = -mean_square / (2.0 * safe_n * safe_n) - tl.log(safe_n) - LOG_SQRT_2PI
    return tl.where(noisy, logp * scale, 0.0)
