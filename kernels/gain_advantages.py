"""GPU kernel of `sfgrpo::gain_advantages` and `gain_advantages_`: a program for each prompt.

Statistics take two passes in fp32, mean first. "uniform" is "per_step" on the final reward, which
is the same at every step, so the two share their code. The rewards are read from memory once and
again from cache: they are few.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import LAUNCH, copy_back, device_function, launch, rows_like, store_tile
from sfgrpo.ops.gain_advantages import GainOperands

JOINT = tl.constexpr(0)
PER_STEP = tl.constexpr(1)
CENTERED = tl.constexpr(2)
UNIFORM = tl.constexpr(3)
RELATIVE_STD_FLOOR = tl.constexpr(1e-6)
MAX_COLS = 64
"""Steps per tile: 64 still leave room for 16 trajectories in it."""


@device_function
def unmasked(mask, row, col, exists):
    """Which of the gains that exist count; `mask`: pointer or None, strides of rows and columns."""
    counts = exists
    if mask[0] is not None:
        counts = tl.load(mask[0] + row * mask[1] + col * mask[2], mask=exists, other=0) != 0
    return counts


@device_function
def load_values(
    rewards_ptr, mask, first_row, first_col, trajectories, steps, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Values to standardise, whether they enter the statistics, whether they exist."""
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (first_col + tl.arange(0, COLS)).to(tl.int64)[None, :]
    exists = (row < trajectories) & (col < steps)
    start = row * (steps + 1)
    counts = exists
    if NORMALIZE == UNIFORM:
        # Taken from the first trajectory's, so that large rewards with small differences keep
        # their digits; a common shift changes no advantage.
        final = tl.load(rewards_ptr + (start + steps + col * 0), mask=exists, other=0.0)
        difference = final - tl.load(rewards_ptr + steps)
    else:
        after = tl.load(rewards_ptr + (start + col + 1), mask=exists, other=0.0)
        difference = after - tl.load(rewards_ptr + (start + col), mask=exists, other=0.0)
        counts = unmasked(mask, row, col, exists)
    return difference.to(tl.float32), counts, exists


@device_function
def column_statistics(
    rewards_ptr, mask, first_col, centre, trajectories, steps, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Per step, over the trajectories: sum and sum of squares about `centre [COLS]`, count."""
    sums = tl.zeros([COLS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    count = tl.zeros([COLS], tl.float32)
    for first_row in range(0, trajectories, ROWS):
        values, counts, _ = load_values(
            rewards_ptr, mask, first_row, first_col, trajectories, steps, NORMALIZE, ROWS, COLS
        )
        deviation = tl.where(counts, values - centre[None, :], 0.0)
        sums += tl.sum(deviation, axis=0)
        squares += tl.sum(deviation * deviation, axis=0)
        count += tl.sum(counts.to(tl.float32), axis=0)
    return sums, squares, count


@device_function
def largest_reward(rewards_ptr, count, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        reward = tl.load(rewards_ptr + index, mask=index < count, other=0.0)
        largest = tl.maximum(largest, tl.abs(reward.to(tl.float32)))
    return tl.max(largest, axis=0)


@device_function
def group_statistics(
    rewards_ptr, mask, trajectories, steps, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Mean of all gains, and their std about it ("joint") or about their step's ("centered")."""
    zero = tl.zeros([COLS], tl.float32)
    sums, squares, count = zero, zero, zero
    for first_col in range(0, steps, COLS):
        column_sums, _, column_count = column_statistics(
            rewards_ptr, mask, first_col, zero, trajectories, steps, NORMALIZE, ROWS, COLS
        )
        sums += column_sums
        count += column_count
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    mean = tl.sum(sums, axis=0) / total
    for first_col in range(0, steps, COLS):
        centre = zero + mean
        if NORMALIZE == CENTERED:
            column_sums, _, column_count = column_statistics(
                rewards_ptr, mask, first_col, zero, trajectories, steps, NORMALIZE, ROWS, COLS
            )
            centre = column_sums / tl.maximum(column_count, 1.0)
        _, column_squares, _ = column_statistics(
            rewards_ptr, mask, first_col, centre, trajectories, steps, NORMALIZE, ROWS, COLS
        )
        squares += column_squares
    return mean, tl.sqrt_rn(tl.sum(squares, axis=0) / total)


@triton.jit(do_not_specialize=["mask_prompt", "mask_row", "mask_col"])
def gain_advantages_kernel(
    rewards_ptr,
    mask_ptr,
    mask_prompt,
    mask_row,
    mask_col,
    out_ptr,
    clamp,
    trajectories,
    steps,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`out_ptr` None: the advantage of step k over the reward of state k."""
    prompt = tl.program_id(0).to(tl.int64)
    rewards_ptr += prompt * trajectories * (steps + 1)
    if out_ptr is not None:
        out_ptr += prompt * trajectories * steps
    if mask_ptr is not None:
        mask_ptr += prompt * mask_prompt
    mask = (mask_ptr, mask_row, mask_col)
    zero = tl.zeros([COLS], tl.float32)
    floor = RELATIVE_STD_FLOOR * largest_reward(
        rewards_ptr, trajectories * (steps + 1), ROWS * COLS
    )
    mean, std = zero, zero
    if (NORMALIZE == JOINT) | (NORMALIZE == CENTERED):
        group_mean, group_std = group_statistics(
            rewards_ptr, mask, trajectories, steps, NORMALIZE, ROWS, COLS
        )
        mean, std = zero + group_mean, zero + group_std
    # In place, a tile of columns has left alone all that later tiles read, statistics included.
    for first_col in range(0, steps, COLS):
        if NORMALIZE != JOINT:
            sums, _, count = column_statistics(
                rewards_ptr, mask, first_col, zero, trajectories, steps, NORMALIZE, ROWS, COLS
            )
            mean = sums / tl.maximum(count, 1.0)
            if NORMALIZE != CENTERED:
                _, squares, _ = column_statistics(
                    rewards_ptr, mask, first_col, mean, trajectories, steps, NORMALIZE, ROWS, COLS
                )
                std = tl.sqrt_rn(squares / tl.maximum(count, 1.0))
        write_advantages(
            rewards_ptr, mask, out_ptr, first_col, mean, std, floor, clamp, trajectories, steps,
            NORMALIZE, ROWS, COLS,
        )  # fmt: skip


@device_function
def write_advantages(
    rewards_ptr, mask, out_ptr, first_col, mean, std, floor, clamp, trajectories, steps,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Standardised values of all trajectories; 0 where masked or where the std carries nothing."""
    alive = std > floor
    safe_std = tl.where(alive, std, 1.0)[None, :]
    width = steps
    if out_ptr is None:
        width = steps + 1
    for first_row in range(0, trajectories, ROWS):
        values, _, exists = load_values(
            rewards_ptr, mask, first_row, first_col, trajectories, steps, NORMALIZE, ROWS, COLS
        )
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        col = (first_col + tl.arange(0, COLS)).to(tl.int64)[None, :]
        advantage = (values - mean[None, :]) / safe_std
        advantage = tl.minimum(tl.maximum(advantage, -clamp), clamp)
        # "uniform" keeps masked steps in its statistics, not in its result.
        kept = unmasked(mask, row, col, exists) & alive[None, :]
        # Its barrier matters here: r_k is wanted by two threads, those of the steps k - 1 and k.
        store_tile(out_ptr, rewards_ptr, row * width + col, exists, tl.where(kept, advantage, 0.0))


def gain_advantages(o: GainOperands) -> Tensor:
    """Advantages `[P, N, T]` in fp32 from rewards `[P, N, T + 1]` in fp32 or fp64."""
    prompts, trajectories, states = o.rewards.shape
    out = torch.empty(
        prompts, trajectories, states - 1, dtype=torch.float32, device=o.rewards.device
    )
    _launch(o._replace(rewards=o.rewards.contiguous()), out)
    return out


def gain_advantages_(o: GainOperands) -> None:
    """Write the advantage of step k over the reward of state k; the final rewards stay."""
    rows = o._replace(rewards=o.rewards.contiguous())
    _launch(rows, None)
    copy_back(o.rewards, rows.rewards)


def _launch(o: GainOperands, out: Tensor | None) -> None:
    prompts, trajectories, states = o.rewards.shape
    steps = states - 1
    if prompts * trajectories * steps == 0:
        return
    cols = min(1 << (steps - 1).bit_length(), MAX_COLS)
    launch(
        gain_advantages_kernel,
        (prompts,),
        o.rewards,
        o.mask,
        *((0, 0, 0) if o.mask is None else o.mask.stride()),
        out,
        math.inf if o.clamp is None else o.clamp,
        trajectories,
        steps,
        NORMALIZE=o.normalize,
        ROWS=LAUNCH.tile_elements // cols,
        COLS=cols,
    )


def _example(normalize: int, *, masked: bool = False, in_place: bool = False) -> object:
    rewards = rows_like(24 * 11).reshape(-1, 24, 11)
    mask = torch.empty(16, 24, 10, dtype=torch.bool, device="meta") if masked else None
    o = GainOperands(rewards, normalize, mask, 5.0)
    return (gain_advantages_ if in_place else gain_advantages)(o)


EXAMPLES = {
    "joint, masked": lambda: _example(JOINT.value, masked=True),
    "per_step, in place": lambda: _example(PER_STEP.value, in_place=True),
    "centered, masked": lambda: _example(CENTERED.value, masked=True),
    "uniform, masked, in place": lambda: _example(UNIFORM.value, masked=True, in_place=True),
}
