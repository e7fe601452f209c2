"""The clean estimates of two trajectories, kept as pictures: what credit is given for.

    strips/000010.png    a row per trajectory, a column per scored state, the final image last
    strips/000010.json   `Strip`

They are trajectories of the iteration before an evaluation, of one prompt on rank 0: the two whose
final rewards differ least for how much their intermediate rewards do. Uniform credit sees no
difference between them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from sfgrpo import files
from sfgrpo.backbones.base import Backbone
from sfgrpo.prompts import Prompt
from sfgrpo.rollout import Plan, Trajectories, batches

SIDE = 192
"""Pixels of the longer side of a picture; larger ones are made smaller."""


@dataclass(frozen=True)
class Strip:
    """What the pictures belong to."""

    prompt: str
    states: list[int]
    """The scored states; the last is the final image."""
    levels: list[float]
    """Their noise levels."""
    rewards: list[list[float]]
    """The reward of each clean estimate, for each trajectory."""
    contrast: float
    """Mean difference of the intermediate rewards minus that of the final ones."""


def choose(rewards_MK: Tensor, group_of_M: Tensor) -> tuple[list[int], float]:
    """The pair of trajectories of one group, and its contrast; where no group has two with finite
    rewards, the one whose reward changes most, or none.

    Args:
        rewards_MK: of the scored states, the final image last; K >= 2.
    """
    best, contrast = list[int](), -torch.inf
    finite_M = rewards_MK.isfinite().all(1)
    for group in group_of_M.unique().tolist():
        members = ((group_of_M == group) & finite_M).nonzero().flatten()
        if len(members) < 2:
            continue
        rewards = rewards_MK[members].double()
        apart = (rewards[:, None] - rewards).abs()
        # Never a pair of one with itself, where all rewards of a group are the same.
        found = (apart[..., :-1].mean(-1) - apart[..., -1]).fill_diagonal_(-torch.inf)
        if float(found.max()) > contrast:
            place, contrast = divmod(int(found.argmax()), len(members)), float(found.max())
            best = [int(members[k]) for k in place]
    if not best and finite_M.any():
        moved_M = rewards_MK.diff(dim=1).abs().sum(1)
        return [int(torch.where(finite_M, moved_M, -1).argmax())], 0.0
    return best, contrast if best else 0.0


@torch.no_grad()
def make(backbone: Backbone, made: Trajectories, members: Sequence[int]) -> Tensor:
    """Pictures uint8 `[len(members), K, 3, H, W]` of the clean estimates; of a video, its middle
    frame. They are decoded anew: keeping all of an iteration's would take its memory."""
    rows = made.states.where_MK[list(members)].flatten()
    found = []
    for part in batches(len(rows), backbone.decode_batch):
        decoded = backbone.decode(made.states.x_U[rows[part]])
        shown = decoded[:, decoded.shape[1] // 2] if backbone.modality == "video" else decoded
        scale = min(1.0, SIDE / max(shown.shape[-2:]))
        if scale < 1:
            size = [max(1, round(side * scale)) for side in shown.shape[-2:]]
            shown = F.interpolate(shown.float(), size, mode="bilinear", antialias=True)
        found.append((shown.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(found).unflatten(0, (len(members), -1))


def keep(
    folder: Path, iteration: int, backbone: Backbone, made: Trajectories, rewards_MK: Tensor,
    plan: Plan, *, states: Sequence[int], levels: Sequence[float], prompts: Sequence[Prompt],
) -> None:  # fmt: skip
    """Keep a strip of this rank's trajectories, where there are gains and pictures.

    Args:
        rewards_MK: rewards of the K scored `states`, the final image last, at noise `levels`.
    """
    if backbone.modality == "other" or len(states) < 2:
        return
    members, contrast = choose(rewards_MK, plan.group_of_M)
    if not members:
        return
    prompt = prompts[int(plan.prompt_G[plan.group_of_M[members[0]]])]
    strip = Strip(
        prompt=prompt.text, states=list(states), levels=[round(level, 6) for level in levels],
        rewards=rewards_MK[members].tolist(), contrast=contrast,
    )  # fmt: skip
    save(folder, iteration, make(backbone, made, members), strip)


def save(folder: Path, iteration: int, pictures: Tensor, strip: Strip) -> None:
    """Write both files of an iteration."""
    place = folder / "strips"
    place.mkdir(exist_ok=True)
    grid = rearrange(pictures, "m k c h w -> (m h) (k w) c")
    with files.replacing(place / f"{iteration:06d}.png") as aside:
        Image.fromarray(grid.numpy()).save(aside)
    files.write(place / f"{iteration:06d}.json", json.dumps(asdict(strip), indent=1) + "\n")
