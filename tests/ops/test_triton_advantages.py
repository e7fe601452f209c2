"""Triton kernels of the advantages against the reference."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from sfgrpo.kernels import gain_advantages as kernels
from sfgrpo.ops._backends import launcher
from sfgrpo.ops._library import REFERENCES
from sfgrpo.ops.gain_advantages import NORMALIZATIONS, GainOperands
from tests.support.ops.triton_support import EPS, interpret, launches

gain_advantages, gain_advantages_ = launcher("gain_advantages"), launcher("gain_advantages_")


def _rewards(prompts: int, trajectories: int, steps: int, offset: float = 20.0) -> Tensor:
    generator = torch.Generator().manual_seed(trajectories * 100 + steps)
    rewards = torch.randn(prompts, trajectories, steps + 1, generator=generator)
    # Kept to few digits, so that gains of large rewards are exact in fp32.
    return (rewards * 64).round() / 64 + offset


def _advantage_error(exact: Tensor) -> Tensor:
    """Two sums of at most 1024 fp32 numbers in blocks, a division, a square root."""
    return 40 * EPS * (exact.abs() + 1)


@pytest.mark.parametrize(
    ("trajectories", "steps", "whole"),
    [(1, 1, True), (24, 10, True), (64, 64, True), (65, 33, False), (3, 2000, False)],
)
def test_a_group_that_fits_is_read_in_one_pass(trajectories: int, steps: int, whole: bool) -> None:
    rewards = _rewards(2, trajectories, steps)
    with mock.patch.object(kernels, "launch") as launch:
        kernels.gain_advantages(GainOperands(rewards, 0, None, None))
    sizes = launch.call_args.kwargs
    assert sizes["WHOLE"] == whole
    assert sizes["ROWS"] * sizes["COLS"] <= 32 * 8 * sizes["num_warps"]
    if whole:
        assert sizes["ROWS"] >= trajectories
        assert sizes["COLS"] >= steps


SHAPES = [(1, 1), (2, 1), (1, 5), (24, 10), (70, 9), (18, 65)]


@pytest.mark.parametrize("normalize", range(4), ids=NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("trajectories", "steps", "most"),
    [*((n, t, kernels.MAX_WHOLE) for n, t in SHAPES), *((n, t, 0) for n, t in SHAPES), (300, 9, 1)],
)
def test_advantages(
    trajectories: int,
    steps: int,
    most: int,
    masked: bool,
    normalize: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one pass and, with `most` elements of a group below its own, in several."""
    monkeypatch.setattr(kernels, "MAX_WHOLE", most)
    rewards = _rewards(2, trajectories, steps)
    mask = torch.rand(2, trajectories, steps) < 0.7 if masked else None
    got = interpret(gain_advantages, rewards, normalize, mask, 1.5)
    exact = REFERENCES["gain_advantages"](rewards, normalize, mask, 1.5)
    assert got.dtype == torch.float32
    assert ((got - exact).abs() <= _advantage_error(exact)).all()
    written = rewards.clone()
    interpret(gain_advantages_, written, normalize, mask, 1.5)
    assert torch.equal(written[:, :, :-1], got)
    assert torch.equal(written[:, :, -1], rewards[:, :, -1])


@pytest.mark.parametrize("normalize", range(4), ids=NORMALIZATIONS)
@pytest.mark.parametrize("most", [0, kernels.MAX_WHOLE])
def test_advantages_without_clamp_and_in_float64(
    most: int, normalize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MAX_WHOLE", most)
    rewards = _rewards(2, 24, 10, offset=1e5).double() + 1e-4 * torch.rand(2, 24, 11).double()
    got = interpret(gain_advantages, rewards, normalize, None, None)
    exact = REFERENCES["gain_advantages"](rewards, normalize, None, None)
    assert exact.abs().max() > 1.5
    assert ((got - exact).abs() <= _advantage_error(exact)).all()
    strided = rewards.transpose(1, 2).contiguous().transpose(1, 2)
    interpret(gain_advantages_, strided, normalize, None, None)
    assert torch.equal(strided[:, :, :-1].float(), got)
    assert torch.equal(strided[:, :, -1], rewards[:, :, -1])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_mask_of_steps_serves_every_trajectory(in_place: bool) -> None:
    rewards, steps = _rewards(2, 5, 6), torch.tensor([True, False, True, True, False, True])
    want = REFERENCES["gain_advantages"](rewards, 0, steps.expand(2, 5, 6), None)
    mask = steps.expand(2, 5, 6)
    with launches() as seen:
        if in_place:
            interpret(gain_advantages_, rewards, 0, mask, None)
            got = rewards[:, :, :-1]
        else:
            got = interpret(gain_advantages, rewards, 0, mask, None)
    assert len(seen) == 1
    assert ((got - want).abs() <= _advantage_error(want)).all()


@pytest.mark.parametrize("normalize", range(4), ids=NORMALIZATIONS)
@pytest.mark.parametrize("most", [0, kernels.MAX_WHOLE])
def test_equal_gains_carry_no_signal(
    most: int, normalize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MAX_WHOLE", most)
    ramp = torch.arange(6.0).expand(1, 4, 6) * 0.1
    alive = _rewards(1, 4, 5)
    got = interpret(gain_advantages, torch.cat((ramp, alive)), normalize, None, 5.0)
    assert torch.equal(got[0], torch.zeros(4, 5))
    assert got[1].abs().max() > 0.5


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_no_gains(shape: tuple[int, int, int]) -> None:
    prompts, trajectories, steps = shape
    rewards = torch.zeros(prompts, trajectories, steps + 1)
    assert gain_advantages(rewards, 0, None, None).shape == shape
    gain_advantages_(rewards, 0, None, None)
