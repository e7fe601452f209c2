"""Trajectories -> the rewards of clean estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sfgrpo.credit import Rewards, placed
from sfgrpo.estimates import clean_estimates
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Mixture
from sfgrpo.rollout import Trajectories, VelocityField, batches

Lap = Callable[[str], None]


def measure(
    reward: Mixture, images: Tensor, prompt: Tensor, prompts: Sequence[Prompt],
    final: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Scores of images made for the prompts of the rows `prompt [B]`; they may be not finite.

    Args:
        final: bool `[B]`, which are final images; all of them by default.

    Returns:
        `{"reward": [B], "<component>": [B], ...}`, fp32 on the images' device.
    """
    asked = [prompts[row] for row in prompt.tolist()]
    total, parts = reward(
        images, [p.text for p in asked], [p.metadata for p in asked],
        where=[p.where for p in asked], finite=False, final=final,
    )  # fmt: skip
    return {k: v.to(images.device) for k, v in {"reward": total, **parts}.items()}


@torch.no_grad()
def score(
    field: VelocityField,
    trajectories: Trajectories,
    reward: Mixture,
    prompts: Sequence[Prompt],
    *,
    lap: Lap,
) -> dict[str, Tensor]:
    """Scores of the states of this rank's trajectories that are to be scored; 0 of a state that is
    no final image by a reward of those alone.

    Each distinct state is estimated, decoded and scored once, samples as many at once as the
    backbone decodes, so that few videos are held in memory.

    Args:
        lap: called with the name of each phase as it ends.

    Returns:
        `{name: [M, K]}`, the final image last; `sfgrpo.guard` sees to values that are not finite.
    """
    states, found = trajectories.states, []
    estimates_U = clean_estimates(field, trajectories)
    lap("estimates")
    final_U = torch.arange(len(estimates_U)) >= len(estimates_U) - len(trajectories.latents_MS)
    for rows in batches(len(estimates_U), field.backbone.decode_batch):
        samples = field.backbone.decode(estimates_U[rows])
        field.tally.decoded += len(samples)
        lap("decode")
        found.append(measure(reward, samples, states.prompt_U[rows], prompts, final_U[rows]))
        field.tally.scored += len(samples)
        field.tally.scored_final += int(final_U[rows].sum()) if reward.final_only else 0
        lap("rewards")
    scores_U = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return {name: values[states.where_MK] for name, values in scores_U.items()}


def at_their_states(scores_PNK: Mapping[str, Tensor], reward: Mixture, where_S: Tensor) -> Rewards:
    """The scores of whole groups at the states they belong to, 0 where no reward was asked.

    Args:
        where_S: int64 `[T + 1]` of `credit.scored_states`.
    """
    return Rewards(
        scores={name: placed(scores_PNK[name], where_S) for name in reward.weights},
        weights=reward.weights, final_only=reward.final_only,
    )  # fmt: skip
