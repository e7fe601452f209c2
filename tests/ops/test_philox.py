"""The noise: published vectors, the same bits in C++ as in the specification, and a normal law."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from sfgrpo.ops.philox import (
    box_muller,
    cos_sin_2pi,
    natural_log,
    philox4x32,
    uniform,
)
from tests.support.ops.cases import BF16, F16, F32, F64, SHAPES, poisoned, same_bits
from tests.support.ops.zeros import ELEMENTS, ZEROS, wrong_zeros
from tests.support.ops.zeros import SAMPLES as ZERO_SAMPLES

SEEDS = [0, 1, 2**31, 2**32 + 5, 2**63 - 1]
SAMPLES = torch.tensor([0, 1, 2**32, 2**40 + 17, -5, -(2**63)])
STEPS = torch.tensor([0, 1, 2**31 + 5, 2**32 - 1, 3, 4])

# Random123's kat_vectors, philox4x32-10: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    got = philox4x32(words, (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in got) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("numel", [math.prod(shape) for shape in SHAPES] + [100_003])
def test_bits_are_those_of_the_specification(seed: int, numel: int) -> None:
    with poisoned():
        got = ops.philox_normal((numel,), seed=seed, sample_ids=SAMPLES, step_ids=STEPS)
    assert same_bits(got, REFERENCES["philox_normal"](numel, seed, SAMPLES, 0, STEPS, F32))


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
def test_other_dtypes_are_the_rounded_float32(dtype: torch.dtype) -> None:
    arguments = {"seed": 3, "sample_ids": SAMPLES, "step_ids": 2}
    got = ops.philox_normal((5, 601), dtype=dtype, **arguments)
    assert same_bits(got, ops.philox_normal((5, 601), **arguments).to(dtype))


def test_noise_depends_on_its_coordinates_only() -> None:
    whole = ops.philox_normal((2050,), seed=9, sample_ids=SAMPLES, step_ids=STEPS)
    for row in range(len(SAMPLES)):
        one = ops.philox_normal(
            (41, 25), seed=9, sample_ids=SAMPLES[row : row + 1], step_ids=int(STEPS[row])
        )
        assert same_bits(one.reshape(-1), whole[row, : 41 * 25])


@pytest.mark.parametrize("changed", ["seed", "sample_ids", "step_ids"])
def test_streams_are_uncorrelated(changed: str) -> None:
    arguments = {"seed": 1, "sample_ids": torch.tensor([1]), "step_ids": torch.tensor([1])}
    one = ops.philox_normal((100_000,), **arguments)
    arguments[changed] = arguments[changed] + 1
    other = ops.philox_normal((100_000,), **arguments)
    assert abs(float((one * other).mean())) < 5 / math.sqrt(100_000)


@functools.cache
def _normals() -> Tensor:
    """Ten million of them: 160 samples of a latent's size."""
    ids = torch.arange(160)
    return ops.philox_normal((65_536,), seed=2024, sample_ids=ids, step_ids=7).double().reshape(-1)


def test_moments_are_those_of_a_normal() -> None:
    z = _normals()
    n = z.numel()
    # Variances of the sample moments of a standard normal; five standard errors.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float(z.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n), power


def test_distribution_is_normal() -> None:
    """Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 with probability 0.001."""
    z = _normals().sort().values
    n = z.numel()
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    rank = torch.arange(1, n + 1, dtype=F64) / n
    assert math.sqrt(n) * float((cdf - rank).abs().max()) < 1.95


def test_neighbours_are_uncorrelated() -> None:
    z = _normals()
    for lag in (1, 2, 3, 4, 64, 1024, 65_536):
        correlation = float((z[:-lag] * z[lag:]).mean())
        assert abs(correlation) < 5 / math.sqrt(z.numel() - lag), lag


def test_zeros_have_the_sign_of_the_specification() -> None:
    """In the specification itself, which the signs were worked out for, and on this machine."""
    exact = REFERENCES["philox_normal"](ELEMENTS, 0, ZERO_SAMPLES, 0, None, F32)
    got = ops.philox_normal((ELEMENTS,), seed=0, sample_ids=ZERO_SAMPLES, step_ids=0)
    assert wrong_zeros(exact) == wrong_zeros(got) == []
    assert wrong_zeros(exact.abs()) == [case for case, negative in ZEROS.items() if negative]


def test_extreme_words_are_finite() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    one, other = torch.meshgrid(words, words, indexing="ij")
    for z in box_muller(one.reshape(-1), other.reshape(-1)):
        assert bool(torch.isfinite(z).all())
        assert float(z.abs().max()) < math.sqrt(66 * math.log(2)) + 1e-6  # u = 2^-33


def test_polynomials_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (200_000,), generator=generator)
    words = torch.cat((torch.arange(2000), words, 2**32 - 1 - torch.arange(2000)))
    u = uniform(words)
    exact = u.double().log()
    ulp = torch.finfo(F32).eps * exact.abs().clamp(min=2.0**-24)
    assert float(((natural_log(u) - exact).abs() / ulp).max()) < 1.0
    cos, sin = cos_sin_2pi(u)
    angle = 2 * math.pi * u.double()
    # Two roundings of values up to 1, and 2 pi rounded to float32.
    assert float((cos - angle.cos()).abs().max()) < 2 * torch.finfo(F32).eps
    assert float((sin - angle.sin()).abs().max()) < 2 * torch.finfo(F32).eps


def test_empty() -> None:
    ids = torch.arange(3)
    assert ops.philox_normal((0, 4), seed=0, sample_ids=ids, step_ids=0).shape == (3, 0, 4)
    assert ops.philox_normal((4,), seed=0, sample_ids=ids[:0], step_ids=0).shape == (0, 4)
    assert ops.philox_normal((), seed=0, sample_ids=ids, step_ids=0).shape == (3,)
