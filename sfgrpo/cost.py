"""What an iteration takes, known before it runs: the numbers that `sfgrpo.tally` counts in it.

States 0 .. T of a trajectory are one latent for each group up to the first step with noise, and one
for each trajectory behind it.

Left out: forwards that only keep pace with ranks that have more batches (ZeRO stage 3, gathering
layer by layer), of one latent each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfgrpo.config import Recipe
from sfgrpo.layout import Layout
from sfgrpo.sde import Schedule
from sfgrpo.solvers import Method
from sfgrpo.tally import Tally


def expected(recipe: Recipe, sigmas: Tensor, *, world: int = 1, iteration: int = 0) -> Tally:
    """The counts of all ranks together, of an iteration over the schedule `sigmas [T + 1]`.

    Raises:
        ValueError: numbers that do not fit together; a rule, solver or option that is unknown.
    """
    layout = Layout(recipe, sigmas, rank=0, world=world, device=torch.device("cpu"))
    schedule = layout.schedule(iteration)
    carried, latents = layout.methods(schedule), _latents(layout, schedule)
    velocity = 0
    for state, method in carried.items():
        # Nobody has evaluated the first velocity of a state behind the last step sampled.
        velocity += latents(state) * (further_evaluations(method) + (state == schedule.sampled))
    rows = layout.trajectories * int(schedule.trainable_T.sum())
    if recipe.train.old_logp == "training":
        velocity += rows - world * layout.rows_per_update
    if recipe.train.beta:
        velocity += rows
    branches = _branches(recipe)
    images = sum(map(latents, {*carried, schedule.sampled}))
    finals = latents(schedule.sampled) if layout.final_only else 0
    return Tally(
        velocity=sampling(layout, schedule) + branches * velocity, gradient=branches * rows,
        decoded=images, scored=images, scored_final=finals,
    )  # fmt: skip


def sampling(layout: Layout, schedule: Schedule) -> int:
    """Network rows that sampling takes on all ranks, without estimates."""
    latents = _latents(layout, schedule)
    return _branches(layout.recipe) * sum(map(latents, range(schedule.sampled)))


def _branches(recipe: Recipe) -> int:
    """Network rows of one velocity."""
    return 1 if recipe.sample.guidance_scale == 1 else 2


def _latents(layout: Layout, schedule: Schedule) -> Callable[[int], int]:
    """From a state to how many latents of all ranks stand there."""
    parted, groups = int(schedule.trainable_T.nonzero()[0]), _groups(layout)
    return lambda state: groups if state <= parted else layout.trajectories


def _groups(layout: Layout) -> int:
    """Groups of all ranks; one that spans ranks is begun on each of them."""
    share, size = layout.local, layout.recipe.sample.group_size
    starts = range(0, layout.trajectories, share)
    return sum((start + share - 1) // size - start // size + 1 for start in starts)


def further_evaluations(method: Method) -> int:
    """How many velocities a solver asks for beside the sampler's own, found by running it on a
    latent of one element."""
    if method.rest is None:
        return 0
    x, asked, answer = torch.zeros(1, 1, 1, 1, device="cpu"), 0, None
    stages = method.rest(x, x.clone())
    while True:
        try:
            latents, _ = stages.send(answer)  # pyright: ignore[reportArgumentType]
        except StopIteration:
            return asked
        asked, answer = asked + 1, torch.zeros_like(latents)
