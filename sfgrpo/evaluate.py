"""Images from fixed noise by the plain ODE, their rewards, and what the judges say of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfgrpo import engine, sde
from sfgrpo.guard import NonFinite
from sfgrpo.prompts import Prompt, spread
from sfgrpo.rollout import Plan, VelocityField, batches, sample

HELD_OUT = 2**62
"""Noise ids from here on belong to evaluation; training counts up from 0 and never gets here."""

Judge = Callable[[Tensor, Sequence[Mapping[str, Any]]], Mapping[str, float]]
"""`(images [P, N, 3, H, W], metadata of the P prompts) -> named numbers`."""


@dataclass(frozen=True)
class Evaluation:
    """The result, the same on every rank."""

    numbers: dict[str, float]
    images_PN: Tensor
    """uint8 `[P, N, 3, H, W]`."""
    prompts: list[Prompt]


def load_judge(name: str) -> Judge:
    """Import "module:function"."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"eval.judges: '{name}' is not a 'module:function': {error}") from None


def held_out_plan(prompts: int, images: int, device: torch.device) -> Plan:
    """Every image its own noise; this rank's contiguous share, padded to equal lengths."""
    total = prompts * images
    share = -(-total // engine.world())
    index = torch.arange(engine.rank() * share, (engine.rank() + 1) * share, device=device)
    return Plan(
        group_G=index + HELD_OUT,
        prompt_G=index.clamp_max(total - 1) // images,
        group_of_M=torch.arange(share, device=device),
        sample_M=index + HELD_OUT,
    )


@torch.no_grad()
def evaluate(
    field: VelocityField,
    prompts: Sequence[Prompt],
    score: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    judges: Sequence[Judge],
    *,
    seed: int,
    num_steps: int,
    images_per_prompt: int,
    latent_shape: tuple[int, ...],
) -> Evaluation:
    """Sample `images_per_prompt` images of every prompt and measure them.

    Args:
        field: the policy, with the conditioning of exactly these prompts.
        score: `(images, prompt rows) -> {name: [B]}`.
    """
    table = sde.coefficients(field.backbone.sigmas(num_steps), "ode")
    plan = held_out_plan(len(prompts), images_per_prompt, field.backbone.device)
    images, scores = [], []
    for rows in batches(len(plan.sample_M), field.batch_size):
        part = Plan(
            group_G=plan.group_G[rows],
            prompt_G=plan.prompt_G[rows],
            group_of_M=torch.arange(rows.stop - rows.start, device=plan.sample_M.device),
            sample_M=plan.sample_M[rows],
        )
        made = sample(field, table, part, seed=seed, latent_shape=latent_shape, substeps=None)
        decoded = field.backbone.decode(made.states.x_U)
        scores.append(score(decoded, part.prompt_G))
        images.append((decoded * 255).round().to(torch.uint8))
    total = len(prompts) * images_per_prompt
    index = plan.sample_M - HELD_OUT
    gathered = {
        name: engine.gather(torch.cat([s[name] for s in scores]), index)[:total]
        for name in scores[0]
    }
    numbers = means(gathered)
    pictures = engine.gather(torch.cat(images), index)[:total].cpu()
    images_PN = pictures.unflatten(0, (len(prompts), images_per_prompt))
    for judge in judges:
        numbers.update(judge(images_PN.float() / 255, [p.metadata for p in prompts]))
    return Evaluation(numbers, images_PN, list(prompts))


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each score over the images whose reward is finite; `dropped_images` counts the
    others, if there are any."""
    kept = scores["reward"].isfinite()
    if not kept.any():
        raise NonFinite(f"none of the {len(kept)} images of the evaluation has a finite reward")
    numbers = {name: values[kept].mean().item() for name, values in scores.items()}
    return numbers if kept.all() else {**numbers, "dropped_images": int((~kept).sum())}


def chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The prompts that evaluation shows."""
    return [prompts[i] for i in spread(count, len(prompts))]
