"""What ZeRO does to a recipe: the stage that runs, buckets, whether sampling gathers all weights.

The engine configures DeepSpeed with it and the doctor estimates memory with it. It stands outside
of both: importing the package `sfgrpo.engine` imports DeepSpeed, which the doctor does without.
Numbers in, numbers out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sfgrpo.config import Recipe

BUCKET = 500_000_000
"""DeepSpeed's own bucket, in elements; it allocates all of it even for a small network."""
LIVE = 1_000_000_000
"""Elements that stage 3 keeps gathered at most, and DeepSpeed's own number
(`stage3_max_live_parameters`)."""
PREFETCH = 50_000_000
"""Elements that stage 3 gathers ahead at most, and DeepSpeed's own number."""


def stage(recipe: Recipe) -> int:
    """The ZeRO stage that runs: DeepSpeed's stage 0 is wrong in half precision, so that is 1."""
    return max(recipe.deepspeed.zero_stage, 0 if recipe.model.dtype == "fp32" else 1)


def shards_parameters(recipe: Recipe) -> bool:
    """Whether no rank holds the whole network."""
    return stage(recipe) == 3


def bucket(trained: int, largest: int) -> int:
    """Elements of a reduce bucket, of a network with so many trained elements, `largest` of them in
    its largest trained parameter, which has to fit in."""
    return min(BUCKET, max(trained // 16, largest, 1))


def live(elements: int) -> int:
    """Elements that stage 3 keeps gathered between layers. DeepSpeed lets nothing go below its own
    number, which is all of most networks; ours keep a quarter."""
    return min(LIVE, elements // 4)


def gathers_once(mode: Literal["auto", "rollout", "layer"], needed: int, free: int | None) -> bool:
    """Whether sampling at stage 3 gathers all parameters once ("rollout") or layer by layer.

    "auto" is "rollout" if the parameters, `needed` bytes, take at most half of the `free` bytes of
    a rank's GPU, and on CPUs (None).
    """
    if mode != "auto" or free is None:
        return mode != "layer"
    return 2 * needed <= free
