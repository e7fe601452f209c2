"""Settings that run, and are known to disappoint."""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo import cost
from sfgrpo.config import Recipe
from sfgrpo.doctor.machine import Problem
from sfgrpo.layout import Layout
from sfgrpo.sde import Schedule

BENT = 0.4
"""The noise level above which one step along the velocity is no estimate of the image
(`sfgrpo.solvers.by_level`)."""
FAINT = 0.02
"""Noise of a step, of latents of size 1, that changes next to nothing in the image."""


def notes(recipe: Recipe, sigmas: Tensor) -> list[Problem]:
    """What is to be said of a recipe over the schedule `sigmas [T + 1]`."""
    layout = _layout(recipe, sigmas)
    schedule = layout.schedule(0)
    found = (_one_step(layout, schedule), _one_gain(layout, schedule), _faint(recipe, sigmas))
    return [note for note in (*found, _sampled_density(recipe)) if note]


def _layout(recipe: Recipe, sigmas: Tensor) -> Layout:
    return Layout(recipe, sigmas, rank=0, world=1, device=torch.device("cpu"))


def _estimated(layout: Layout, schedule: Schedule) -> dict[int, int]:
    """State -> velocities that its solver asks for, of those that are not the image."""
    methods = layout.methods(schedule)
    return {
        state: cost.further_evaluations(method)
        for state, method in methods.items()
        if state < schedule.sampled
    }


def _one_step(layout: Layout, schedule: Schedule) -> Problem | None:
    estimated = _estimated(layout, schedule)
    level = max((float(schedule.table[state, 3]) for state in estimated), default=0.0)
    if any(estimated.values()) or level <= BENT:
        return None
    return Problem(
        what=f"every clean estimate is the Tweedie projection (T' = 1), up to noise level "
        f"{level:.2f}: DenseGRPO found credit by such estimates worse than uniform credit",
        remedy="credit.solver by_level, which spends evaluations where the path bends",
    )


def _one_gain(layout: Layout, schedule: Schedule) -> Problem | None:
    if layout.recipe.credit.rule != "stepwise" or len(_estimated(layout, schedule)) != 1:
        return None
    return Problem(
        what="all noisy steps of an iteration share one gain, from a state that is the whole "
        "group's: stepwise credit is uniform credit there, and costs more",
        remedy="credit.rule uniform, or more than one noisy step (sample.window.steps) or block "
        "(credit.stride)",
    )


def _faint(recipe: Recipe, sigmas: Tensor) -> Problem | None:
    """Of all steps that a window may come to."""
    window = recipe.sample.window
    first, last = (window and window.range) or (0, recipe.sample.num_steps)
    sample = recipe.sample.model_copy(update={"window": None})
    whole = _layout(recipe.model_copy(update={"sample": sample}), sigmas)
    noise_T = whole.schedule(0).table[:, 2].tolist()
    faint = [k for k in range(first, last) if 0 < noise_T[k] < FAINT]
    if len(faint) < 2:
        return None
    told = ", ".join(f"{noise_T[k]:.2g} at step {k}" for k in faint)
    return Problem(
        what=f"{len(faint)} steps draw hardly any noise ({told}): they cost as much as others and "
        "have next to nothing to learn from",
        remedy=f"sample.min_noise {FAINT} leaves them to the ODE",
    )


def _sampled_density(recipe: Recipe) -> Problem | None:
    if recipe.train.old_logp != "sampling" or recipe.model.dtype == "fp32":
        return None
    return Problem(
        what=f"train.old_logp sampling with model.dtype {recipe.model.dtype}: rounding between "
        "rollout and training moves ratios out of the clip range",
        remedy="train.old_logp training",
    )
