"""GPU kernel of `sfgrpo::gain_advantages` and `gain_advantages_`: a program for each prompt.

Statistics are in fp32, squares about the mean. "uniform" is "per_step" on the final reward, which
is the same at every step, so the two share their code. A group that fits a program's registers is
read in one pass. A larger one takes four, of which each waits for the one before and all but the
first read from cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfgrpo.kernels.common import LAUNCH, copy_back, device_function, launch, rows_like, store_tile
from sfgrpo.kernels.gain_rows import (
    CENTERED,
    JOINT,
    PER_STEP,
    UNIFORM,
    column_statistics,
    group_statistics,
    largest_reward,
    load_values,
)
from sfgrpo.ops.gain_advantages import GainOperands

RELATIVE_STD_FLOOR = tl.constexpr(1e-6)
MAX_COLS = 64
"""Steps per tile of a large group: 64 still leave room for 16 trajectories in it."""
MAX_WHOLE = 4096
"""Elements of the tile of a group that is kept in registers."""
ELEMENTS_PER_WARP = 256
"""Of such a tile at most, 8 per thread: with 16 some normalisations spill on sm_80 and sm_90."""


@device_function
def whole_group(
    rewards_ptr, mask, out_ptr, clamp, trajectories, steps, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Statistics and advantages of a group that is one tile."""
    values, magnitude, counts, kept, exists = load_values(
        rewards_ptr, mask, 0, 0, trajectories, steps, NORMALIZE, ROWS, COLS
    )
    floor = RELATIVE_STD_FLOOR * tl.max(tl.max(magnitude, axis=0), axis=0)
    count = tl.sum(counts.to(tl.float32), axis=0)
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    sums = tl.sum(tl.where(counts, values, 0.0), axis=0)
    mean = sums / tl.maximum(count, 1.0)
    if NORMALIZE == JOINT:
        mean = tl.zeros([COLS], tl.float32) + tl.sum(sums, axis=0) / total
    deviation = tl.where(counts, values - mean[None, :], 0.0)
    squares = tl.sum(deviation * deviation, axis=0)
    std = tl.sqrt_rn(squares / tl.maximum(count, 1.0))
    if (NORMALIZE == JOINT) | (NORMALIZE == CENTERED):
        std = tl.zeros([COLS], tl.float32) + tl.sqrt_rn(tl.sum(squares, axis=0) / total)
    write_advantages(
        rewards_ptr, out_ptr, 0, 0, values, kept, exists, mean, std, floor, clamp, steps, ROWS, COLS
    )


@device_function
def group_in_passes(
    rewards_ptr, mask, out_ptr, clamp, trajectories, steps, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The same of a group of any size, tile by tile."""
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
        for first_row in range(0, trajectories, ROWS):
            values, _magnitude, _counts, kept, exists = load_values(
                rewards_ptr, mask, first_row, first_col, trajectories, steps, NORMALIZE, ROWS, COLS
            )
            write_advantages(
                rewards_ptr, out_ptr, first_row, first_col, values, kept, exists, mean, std, floor,
                clamp, steps, ROWS, COLS,
            )  # fmt: skip


@device_function
def write_advantages(
    rewards_ptr, out_ptr, first_row, first_col, values, kept, exists, mean, std, floor, clamp,
    steps, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Standardised values of a tile; 0 where masked or where the std carries nothing."""
    alive = std > floor
    safe_std = tl.where(alive, std, 1.0)[None, :]
    width = steps
    if out_ptr is None:
        width = steps + 1
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (first_col + tl.arange(0, COLS)).to(tl.int64)[None, :]
    advantage = (values - mean[None, :]) / safe_std
    advantage = tl.minimum(tl.maximum(advantage, -clamp), clamp)
    advantage = tl.where(kept & alive[None, :], advantage, 0.0)
    # Its barrier matters here: r_k is wanted by two threads, those of the steps k - 1 and k.
    store_tile(out_ptr, rewards_ptr, row * width + col, exists, advantage)


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
    WHOLE: tl.constexpr,
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
    if WHOLE:
        whole_group(rewards_ptr, mask, out_ptr, clamp, trajectories, steps, NORMALIZE, ROWS, COLS)
    else:
        group_in_passes(
            rewards_ptr, mask, out_ptr, clamp, trajectories, steps, NORMALIZE, ROWS, COLS
        )


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
    rows, cols = (int(triton.next_power_of_2(size)) for size in (trajectories, steps))
    whole = rows * cols <= MAX_WHOLE
    if not whole:
        cols = min(cols, MAX_COLS)
        rows = LAUNCH.tile_elements // cols
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
        WHOLE=whole,
        ROWS=rows,
        COLS=cols,
        num_warps=max(rows * cols // ELEMENTS_PER_WARP, LAUNCH.num_warps),
    )


def _example(
    normalize: int,
    trajectories: int = 24,
    steps: int = 10,
    dtype: torch.dtype = torch.float32,
    *,
    masked: bool = False,
    in_place: bool = False,
) -> object:
    shape = (16, trajectories, steps)
    rewards = rows_like(trajectories * (steps + 1), dtype).reshape(16, trajectories, steps + 1)
    mask = torch.empty(shape, dtype=torch.bool, device="meta") if masked else None
    o = GainOperands(rewards, normalize, mask, 5.0)
    return (gain_advantages_ if in_place else gain_advantages)(o)


EXAMPLES = {
    "joint, masked": lambda: _example(JOINT.value, masked=True),
    "per_step, in place": lambda: _example(PER_STEP.value, in_place=True),
    "centered, masked": lambda: _example(CENTERED.value, masked=True),
    "uniform, masked, in place": lambda: _example(UNIFORM.value, masked=True, in_place=True),
    "64x64, fp64, centered, masked, in place": lambda: _example(
        CENTERED.value, 64, 64, torch.float64, masked=True, in_place=True
    ),
    "100x60, joint, masked": lambda: _example(JOINT.value, 100, 60, masked=True),
    "100x60, centered, masked": lambda: _example(CENTERED.value, 100, 60, masked=True),
    "100x60, uniform, masked, in place": lambda: _example(
        UNIFORM.value, 100, 60, masked=True, in_place=True
    ),
}
"""The first four of 24 trajectories and 10 steps; the last are too large for one pass."""
