"""Trajectories -> the reward of every state's clean estimate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Mixture
from sfgrpo.rollout import Trajectories, VelocityField, batches, clean_estimates

Lap = Callable[[str], None]


def measure(
    reward: Mixture, images: Tensor, prompt: Tensor, prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Scores of images made for the prompts of the rows `prompt [B]`; they may be not finite.

    Returns:
        `{"reward": [B], "<component>": [B], ...}`, fp32 on the images' device.
    """
    asked = [prompts[row] for row in prompt.tolist()]
    total, parts = reward(
        images, [p.text for p in asked], [p.metadata for p in asked],
        where=[p.where for p in asked], finite=False,
    )  # fmt: skip
    return {k: v.to(images.device) for k, v in {"reward": total, **parts}.items()}


@torch.no_grad()
def score(
    field: VelocityField,
    trajectories: Trajectories,
    reward: Mixture,
    prompts: Sequence[Prompt],
    *,
    substeps: int,
    lap: Lap,
) -> dict[str, Tensor]:
    """Scores of every state of this rank's trajectories.

    Each distinct state is estimated, decoded and scored once: estimates in full batches, samples
    as many at once as the backbone decodes, so that few videos are held in memory.

    Args:
        substeps: T', the ODE substeps of a clean estimate.
        lap: called with the name of each phase as it ends.

    Returns:
        `{name: [M, S]}`, the final image last; `sfgrpo.guard` sees to values that are not finite.
    """
    states, found = trajectories.states, []
    for rows, latents in clean_estimates(field, states, substeps=substeps):
        lap("estimates")
        prompt_B = states.prompt_U[rows]
        for part in batches(len(latents), field.backbone.decode_batch):
            samples = field.backbone.decode(latents[part])
            lap("decode")
            found.append(measure(reward, samples, prompt_B[part], prompts))
            lap("rewards")
    scores_U = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return {name: values[states.where_MS] for name, values in scores_U.items()}


def as_states(scores_MS: Mapping[str, Tensor], states: int) -> Tensor:
    """The rewards as `[M, S]`; rules without estimates know the last, and get zeros before it."""
    known = scores_MS["reward"]
    return torch.nn.functional.pad(known, (states - known.shape[1], 0))
