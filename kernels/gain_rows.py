"""What `gain_advantages` loads of a prompt's group, and the statistics of one tile by tile."""

from __future__ import annotations

import triton.language as tl

from sfgrpo.kernels.common import device_function

JOINT = tl.constexpr(0)
PER_STEP = tl.constexpr(1)
CENTERED = tl.constexpr(2)
UNIFORM = tl.constexpr(3)


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
    """Values to standardise and the larger |reward| of each step's two states; which of them enter
    the statistics, get an advantage, exist."""
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (first_col + tl.arange(0, COLS)).to(tl.int64)[None, :]
    exists = (row < trajectories) & (col < steps)
    start = row * (steps + 1)
    before = tl.load(rewards_ptr + (start + col), mask=exists, other=0.0)
    after = tl.load(rewards_ptr + (start + col + 1), mask=exists, other=0.0)
    # Who does not look at these does not load them either: the compiler sees to that.
    magnitude = tl.maximum(tl.abs(before.to(tl.float32)), tl.abs(after.to(tl.float32)))
    kept = unmasked(mask, row, col, exists)
    if NORMALIZE == UNIFORM:
        # Taken from the first trajectory's, so that large rewards with small differences keep
        # their digits; a common shift changes no advantage.
        final = tl.load(rewards_ptr + (start + steps + col * 0), mask=exists, other=0.0)
        difference = final - tl.load(rewards_ptr + steps)
        # Masked steps are in the statistics, not in the result.
        counts = exists
    else:
        difference = after - before
        counts = kept
    return difference.to(tl.float32), magnitude, counts, kept, exists


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
        values, _, counts, _, _ = load_values(
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
