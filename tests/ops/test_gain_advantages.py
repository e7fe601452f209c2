"""Stepwise credit: hand-computed groups, invariances, masks and degenerate groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from sfgrpo.ops.gain_advantages import NORMALIZATIONS, Normalization
from tests.support.ops.cases import F32, F64, poisoned

REWARDS = torch.tensor([[[0.0, 1.0, 3.0], [0.0, 3.0, 3.0]]])  # gains [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        # Gains 1, 2, 3, 0: mean 1.5, variance 1.25.
        ("joint", [[-0.5 / 1.25**0.5, 0.5 / 1.25**0.5], [1.5 / 1.25**0.5, -1.5 / 1.25**0.5]]),
        ("per_step", [[-1.0, 1.0], [1.0, -1.0]]),
        ("centered", [[-1.0, 1.0], [1.0, -1.0]]),
        ("uniform", [[0.0, 0.0], [0.0, 0.0]]),  # both end at 3
    ],
)
def test_by_hand(normalize: Normalization, expected: list[list[float]]) -> None:
    got = ops.gain_advantages(REWARDS, normalize=normalize)
    torch.testing.assert_close(got, torch.tensor([expected]), rtol=1e-6, atol=1e-6)


def test_uniform_by_hand() -> None:
    rewards = torch.tensor([[[9.0, 5.0, 1.0], [9.0, 7.0, 2.0], [9.0, 8.0, 6.0]]])
    expected = (torch.tensor([1.0, 2.0, 6.0]) - 3.0) / (14 / 3) ** 0.5
    got = ops.gain_advantages(rewards, normalize="uniform")
    torch.testing.assert_close(got[0], expected[:, None].expand(3, 2), rtol=1e-6, atol=1e-6)


def _group(p: int = 3, n: int = 7, t: int = 5, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(p, n, t + 1, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [(3, 7, 5), (1, 1, 1), (2, 1, 4), (200, 24, 10), (0, 4, 3)])
def test_against_the_reference(
    normalize: Normalization,
    masked: bool,
    clamp: float | None,
    dtype: torch.dtype,
    size: tuple[int, int, int],
) -> None:
    rewards = _group(*size, dtype=dtype)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(6)) > 0.4 if masked else None
    with poisoned():
        got = ops.gain_advantages(rewards, normalize=normalize, mask=mask, clamp=clamp)
    exact = REFERENCES["gain_advantages"](rewards, NORMALIZATIONS.index(normalize), mask, clamp)
    # Both compute in float64 and round once.
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_invariant_to_shift_and_scale(normalize: Normalization) -> None:
    rewards = _group()
    one = ops.gain_advantages(rewards, normalize=normalize)
    other = ops.gain_advantages(3.0 * rewards - 10.0, normalize=normalize)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_prompts_do_not_mix(normalize: Normalization) -> None:
    rewards = _group()
    alone = [ops.gain_advantages(rewards[p : p + 1], normalize=normalize) for p in range(3)]
    assert torch.equal(torch.cat(alone), ops.gain_advantages(rewards, normalize=normalize))


def test_statistics_of_the_result() -> None:
    joint = ops.gain_advantages(_group(), clamp=None).double()
    torch.testing.assert_close(joint.mean((1, 2)), torch.zeros(3, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        joint.square().mean((1, 2)), torch.ones(3, dtype=F64), rtol=1e-6, atol=0
    )
    centered = ops.gain_advantages(_group(), normalize="centered", clamp=None).double()
    torch.testing.assert_close(centered.mean(1), torch.zeros(3, 5, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", ["joint", "per_step", "centered"])
def test_masked_steps_take_no_part(normalize: Normalization) -> None:
    """A step that is masked may hold any gain: nothing of the others changes."""
    rewards = _group()
    mask = torch.tensor([True, False, True, True, True])
    other = rewards.clone()
    other[:, :, 2:] += 100 * torch.randn(3, 7, 1, dtype=F64)  # changes the gain of step 1 alone
    one, two = (
        ops.gain_advantages(r, normalize=normalize, mask=mask, clamp=None) for r in (rewards, other)
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert bool((one[:, :, 1] == 0).all())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("level", [0.0, 1.0, 1e6, -3e-8])
def test_equal_gains_give_zero_not_nan(normalize: Normalization, level: float) -> None:
    rewards = torch.full((2, 4, 6), level, dtype=F64) * torch.arange(1, 7, dtype=F64)
    rewards = rewards * (1 + 1e-9 * torch.randn(2, 4, 6, dtype=F64))
    assert bool((ops.gain_advantages(rewards, normalize=normalize) == 0).all())


def test_clamp_limits() -> None:
    rewards = torch.zeros(1, 100, 2)
    rewards[0, 0, 1] = 1.0  # one outlier: (1 - 0.01) / sqrt(0.0099) = 9.95
    assert float(ops.gain_advantages(rewards, clamp=None).max()) == pytest.approx(9.9499, rel=1e-4)
    assert float(ops.gain_advantages(rewards).max()) == 5.0


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m[:1, :1].expand(3, 4, 5),  # one row for all
        lambda m: m[:, :1].expand(3, 4, 5),  # one for a group
        lambda m: m[:1].expand(3, 4, 5),  # one group for all
        lambda m: m.mT.contiguous().mT,
        lambda m: m.repeat(1, 2, 3)[:, ::2, 10:],
    ],
)
def test_a_mask_may_be_a_view(view: Callable[[Tensor], Tensor]) -> None:
    rewards = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = view(torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(2)) > 0.4)
    for normalize in NORMALIZATIONS:
        of_view, of_copy = (
            ops.gain_advantages(rewards, normalize=normalize, mask=one)
            for one in (mask, mask.contiguous())
        )
        assert torch.equal(of_view, of_copy)
        assert not of_view[~mask].any()


def test_full_mask_equals_none_and_empty_mask_gives_zero() -> None:
    rewards = _group()
    everything = torch.ones(3, 7, 5, dtype=torch.bool)
    for normalize in NORMALIZATIONS:
        plain = ops.gain_advantages(rewards, normalize=normalize)
        assert torch.equal(
            plain, ops.gain_advantages(rewards, normalize=normalize, mask=everything)
        )
        assert not ops.gain_advantages(rewards, normalize=normalize, mask=~everything).any()
