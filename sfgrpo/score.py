"""Trajectories -> the rewards of clean estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sfgrpo import engine
from sfgrpo.backbones.base import Backbone
from sfgrpo.credit import Rewards, placed
from sfgrpo.estimates import as_finished
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Mixture, Sound
from sfgrpo.rollout import Trajectories, VelocityField, batches
from sfgrpo.stream import InOrder


class Laps(Protocol):
    """Whoever wants to know where the time goes (`sfgrpo.run.clock.Clock`)."""

    def lap(self, phase: str) -> None:
        """A phase ends here."""
        ...

    def beside(self, phase: str, seconds: float) -> None:
        """So long another thread was at work."""
        ...


def measure(
    reward: Mixture, images: Tensor, prompt: Tensor, prompts: Sequence[Prompt],
    final: Tensor | None = None, sounds: Sequence[Sound] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Scores of images made for the prompts of the rows `prompt [B]`; they may be not finite.

    Args:
        final: bool `[B]`, which are final images; all of them by default.
        sounds: what is `heard` with each.

    Returns:
        `{"reward": [B], "<component>": [B], ...}`, fp32 on the images' device.
    """
    asked = [prompts[row] for row in prompt.tolist()]
    total, parts = reward(
        images, [p.text for p in asked], [p.metadata for p in asked],
        where=[p.where for p in asked], finite=False, final=final, sounds=sounds,
    )  # fmt: skip
    return {k: v.to(images.device) for k, v in {"reward": total, **parts}.items()}


def heard(backbone: Backbone, latents: Tensor) -> list[Sound] | None:
    """The sound of latents [B, ...]; None of a backbone that makes none."""
    hear: Any = getattr(backbone, "sound", None)
    if hear is None:
        return None
    made: Any = backbone
    return [Sound(waveform, made.sound_rate) for waveform in hear(latents)]


@torch.no_grad()
def score(
    field: VelocityField,
    trajectories: Trajectories,
    reward: Mixture,
    prompts: Sequence[Prompt],
    *,
    laps: Laps,
    ahead: int = 0,
) -> dict[str, Tensor]:
    """Scores of the states of this rank's trajectories that are to be scored; 0 of a state that is
    no final image by a reward of those alone.

    Each distinct state is estimated, decoded and scored once, samples as many at once as the
    backbone decodes, so that few videos are held in memory. Samples are scored in a thread of their
    own while the next states are estimated and decoded; which samples go together does not depend
    on when they are ready. The last are waited for: a group needs all of its states, the steps of
    all groups are estimated one after the other, and a micro-batch has rows of most groups. Ranks
    that compute rows together (`VelocityField.context`) decode and score them apart, and tell each
    other.

    Args:
        laps: told of each phase as it ends; "rewards" is what this thread waited for them.
        ahead: batches of samples that may wait for their scores; 0 scores each at once.

    Returns:
        `{name: [M, K]}`, the final image last; `sfgrpo.guard` sees to values that are not finite.
    """
    states = trajectories.states
    final_U = torch.arange(len(states.x_U)) >= len(states.x_U) - len(trajectories.latents_MS)
    waiting, order = list(batches(len(states.x_U), field.backbone.decode_batch)), list[slice]()
    waiting = waiting[engine.rank() % field.context :: field.context]
    with InOrder[dict[str, Tensor]](ahead) as asked:
        for finished_U in as_finished(field, trajectories):
            laps.lap("estimates")
            laps.lap("decode")  # ranks compare their phases, and one may have nothing to decode
            ready = [rows for rows in waiting if finished_U[rows].all()]
            waiting = [rows for rows in waiting if rows not in ready]
            for rows in ready:
                samples = field.backbone.decode(states.x_U[rows])
                sounds = heard(field.backbone, states.x_U[rows]) if reward.takes_sound else None
                field.tally.decoded += len(samples)
                laps.lap("decode")
                who = states.prompt_U[rows], prompts, final_U[rows], sounds
                asked.ask(partial(measure, reward, samples, *who))
                field.tally.scored += len(samples)
                field.tally.scored_final += int(final_U[rows].sum()) if reward.final_only else 0
                laps.lap("rewards")
            order += ready
        found = asked.answers()
    laps.lap("rewards")
    laps.beside("rewards", asked.computed)
    if field.context > 1:
        order, found = _of_group(order, found, field.context)
    asked_U = torch.cat([torch.arange(rows.start, rows.stop) for rows in order])
    back_U = asked_U.argsort().to(states.where_MK.device)
    scores_U = {
        name: torch.cat([part[name] for part in found]).to(back_U.device)[back_U]
        for name in found[0]
    }
    return {name: values[states.where_MK] for name, values in scores_U.items()}


def _of_group(
    order: Sequence[slice], found: Sequence[Mapping[str, Tensor]], ranks: int
) -> tuple[list[slice], list[dict[str, Tensor]]]:
    """Batches of rows and their scores, of all ranks of this one's context group (a collective)."""
    mine = [
        (rows, {name: values.cpu() for name, values in part.items()})
        for rows, part in zip(order, found, strict=True)
    ]
    group, _ = engine.context_group(ranks)
    everyone = engine.exchange(mine)[group * ranks : (group + 1) * ranks]
    together = [batch for batches in everyone for batch in batches]
    return [rows for rows, _ in together], [part for _, part in together]


def at_their_states(scores_PNK: Mapping[str, Tensor], reward: Mixture, where_S: Tensor) -> Rewards:
    """The scores of whole groups at the states they belong to, 0 where no reward was asked.

    Args:
        where_S: int64 `[T + 1]` of `credit.scored_states`.
    """
    return Rewards(
        scores={name: placed(scores_PNK[name], where_S) for name in reward.weights},
        weights=reward.weights, final_only=reward.final_only,
    )  # fmt: skip
