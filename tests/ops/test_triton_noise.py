"""Noise of the Triton kernels: published Philox vectors and the reference's bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from sfgrpo.kernels.philox import philox_rounds, polar, squared_radius, uniform
from sfgrpo.ops import philox as reference
from sfgrpo.ops._backends import launcher
from sfgrpo.ops._library import REFERENCES
from tests.support.ops import zeros
from tests.support.ops.triton_support import interpret

philox_normal = launcher("philox_normal")

SAMPLES = torch.tensor([0, 7, 2**31, 2**33 + 5, 2**62 + 1])
STEPS = torch.tensor([0, 3, 2**31 + 1, 2**32 - 1, 11])


@triton.jit
def _rounds_kernel(words_ptr, out_ptr):
    word = tl.arange(0, 4)
    c0 = tl.load(words_ptr + 0 * word).to(tl.uint32)
    c1 = tl.load(words_ptr + 1 + 0 * word).to(tl.uint32)
    c2 = tl.load(words_ptr + 2 + 0 * word).to(tl.uint32)
    c3 = tl.load(words_ptr + 3 + 0 * word).to(tl.uint32)
    k0 = tl.load(words_ptr + 4).to(tl.uint32)
    k1 = tl.load(words_ptr + 5).to(tl.uint32)
    r0, r1, r2, r3 = philox_rounds(c0, c1, c2, c3, k0, k1)
    low = tl.where(word == 0, r0, r1)
    high = tl.where(word == 2, r2, r3)
    tl.store(out_ptr + word, tl.where(word < 2, low, high).to(tl.int64))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_random123_vectors(words: list[int], expected: list[int]) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    _rounds_kernel[(1,)](torch.tensor(words), out)
    assert out.tolist() == expected


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("numel", [1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 2500])
def test_bits_of_the_reference(numel: int) -> None:
    args = (numel, 2**63 - 5, SAMPLES, 0, STEPS, torch.float32)
    assert torch.equal(
        _bits(interpret(philox_normal, *args)), _bits(REFERENCES["philox_normal"](*args))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 0x9E3779B97F4A7C15 >> 1])
def test_bits_in_every_dtype_and_seed(dtype: torch.dtype, seed: int) -> None:
    args = (70, seed, SAMPLES, 0, STEPS, dtype)
    assert torch.equal(
        _bits(interpret(philox_normal, *args)), _bits(REFERENCES["philox_normal"](*args))
    )


@pytest.mark.parametrize("step", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_one_step_for_all_rows(step: int) -> None:
    args = (70, 5, SAMPLES, step, None, torch.float32)
    noise = interpret(philox_normal, *args)
    assert torch.equal(_bits(noise), _bits(REFERENCES["philox_normal"](*args)))
    each = interpret(
        philox_normal, 70, 5, SAMPLES, 0, torch.full_like(SAMPLES, step), torch.float32
    )
    assert torch.equal(_bits(noise), _bits(each))


def test_bits_of_many_words() -> None:
    """Enough words to meet rare branches: tails of the logarithm, all four quarter turns."""
    ids = torch.arange(16)
    args = (4096, 20, ids, 0, ids, torch.float32)
    noise = interpret(philox_normal, *args)
    assert torch.equal(_bits(noise), _bits(REFERENCES["philox_normal"](*args)))
    assert noise.abs().max() > 4.0
    assert abs(noise.mean()) < 4 / 256
    assert abs(noise.std() - 1) < 4 / 256 / 2**0.5


def test_zeros_have_the_sign_of_the_specification() -> None:
    noise = interpret(philox_normal, zeros.ELEMENTS, 0, zeros.SAMPLES, 0, None, torch.float32)
    assert zeros.wrong_zeros(noise) == []


def test_no_rows_and_no_elements() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert philox_normal(5, 0, none, 0, none, torch.float32).shape == (0, 5)
    assert philox_normal(0, 0, SAMPLES, 0, STEPS, torch.float32).shape == (5, 0)


def test_noise_of_a_row_ignores_the_other_rows() -> None:
    whole = interpret(philox_normal, 56, 3, SAMPLES, 0, STEPS, torch.float32)
    for row in range(5):
        alone = interpret(
            philox_normal, 56, 3, SAMPLES[row : row + 1], 0, STEPS[row : row + 1], torch.float32
        )
        assert torch.equal(alone[0], whole[row])


@triton.jit
def _squares_kernel(words_ptr, out_ptr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.load(words_ptr + index).to(tl.uint32)
    tl.store(out_ptr + index, squared_radius(uniform(word, 1.0)))
    cos, sin = polar(tl.full([N], 1.0, tl.float32), uniform(word, 4.0))
    tl.store(out_ptr + 2 * N + index, cos)
    tl.store(out_ptr + 4 * N + index, sin)


def test_fused_products_are_exact() -> None:
    """Fusing them rounds as the reference's two operations do, at every binade of a word.

    The interpreter rounds twice: here a fused multiply-add rounds once, as on a GPU.
    """
    step = torch.arange(64)
    words = torch.cat([2**k + step for k in range(6, 32)] + [2**k - 1 - step for k in range(6, 33)])
    words = torch.cat((words, words.new_zeros(4096 - len(words))))

    def fma(builder: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype(np.longdouble) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype)

    out = torch.empty(3 * 4096)
    with mock.patch.object(InterpreterBuilder, "create_fma", fma):
        kernel: Any = _squares_kernel
        kernel[(2,)](words, out, N=2048)
    cos, sin = reference.cos_sin_2pi(reference.uniform(words))
    square = -2.0 * reference.natural_log(reference.uniform(words))
    for got, want in zip(out.split(4096), (square, cos, sin), strict=True):
        assert torch.equal(_bits(got), _bits(want))
