"""What all Triton launchers share: schemas, addressing, dtypes, seeds."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from sfgrpo.kernels.common import LAUNCH, split_int64, tile_at, tiling
from sfgrpo.ops._backends import launcher
from sfgrpo.ops._library import DEFINITIONS
from tests.support.ops.triton_support import interpret


@pytest.mark.parametrize("op", sorted(DEFINITIONS))
def test_launcher_takes_the_record_of_its_op(op: str) -> None:
    assert get_type_hints(inspect.unwrap(launcher(op)))["o"] is DEFINITIONS[op].record


@pytest.mark.parametrize("row_elements", [1, 2, 15, 16, 17, 56, 1023, 1024, 1025, 2**31 + 1])
def test_tiling_covers_rows_and_depends_on_nothing_else(row_elements: int) -> None:
    cut = tiling(row_elements)
    assert cut.rows * cut.cols == LAUNCH.tile_elements
    assert (cut.chunks - 1) * cut.cols < row_elements <= cut.chunks * cut.cols
    assert cut.programs(5 * cut.rows + 1) == (6 * cut.chunks,)
    assert cut.align == next(size for size in (4, 2, 1) if row_elements % size == 0)


@triton.jit
def _offsets_kernel(
    out_ptr, mask_ptr, batch, row_elements, chunks, ROWS: tl.constexpr, COLS: tl.constexpr
):
    _, _, _, _, offsets, mask = tile_at(batch, row_elements, chunks, ROWS, COLS, 1)
    local = (tl.arange(0, ROWS) * COLS)[:, None] + tl.arange(0, COLS)[None, :]
    base = tl.program_id(0) * ROWS * COLS
    tl.store(out_ptr + base + local, offsets)
    tl.store(mask_ptr + base + local, mask.to(tl.int32))


@pytest.mark.parametrize("row_elements", [2**31 - 1, 2**33])
def test_addresses_beyond_32_bits(row_elements: int) -> None:
    """Rows so long that only their first columns are looked at: two chunks of four rows."""
    offsets = torch.zeros(2, 4, 16, dtype=torch.int64)
    mask = torch.zeros(2, 4, 16, dtype=torch.int32)
    kernel: Any = _offsets_kernel
    kernel[(2,)](offsets, mask, 3, row_elements, 2, ROWS=4, COLS=16)
    row = torch.arange(4).reshape(1, 4, 1)
    col = torch.arange(32).reshape(2, 1, 16)
    assert torch.equal(offsets, row * row_elements + col)
    assert torch.equal(mask != 0, (row < 3).expand(2, 4, 16))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1])
def test_seed_halves_are_32_bit_integers_that_restore_it(seed: int) -> None:
    low, high = split_int64(seed)
    assert all(-(2**31) <= half < 2**31 for half in (low, high))
    assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == seed


def test_float64_is_refused_with_a_way_out() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float64: convert it, or compute on the CPU"):
        launcher("tweedie")(x, x, None, 0.5)


@pytest.mark.parametrize("row_elements", [56, 57])
def test_misaligned_rows_are_copied_where_they_would_be_vectors(row_elements: int) -> None:
    """Otherwise Triton would take another layout, and with it another order of its sums."""
    aligned = torch.randn(2, row_elements)
    x = torch.zeros(1 + 2 * row_elements)[1:].view(2, row_elements).copy_(aligned)
    starts = []

    def record(_: object, *args: object, **options: object) -> None:
        latents = [a for a in args if isinstance(a, Tensor) and a.shape == x.shape]
        starts.extend(tensor.data_ptr() % 16 for tensor in latents)

    with mock.patch.object(InterpretedFunction, "run", record):
        launcher("tweedie")(x, x, None, 0.5)
    assert starts[:2] == ([0, 0] if row_elements == 56 else [4, 4])
    interpret(launcher("tweedie_"), aligned, x, None, 0.5)
    assert torch.equal(x, aligned - 0.5 * aligned)
