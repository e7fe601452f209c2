"""A small flow policy that reaches: sixteen moves in the plane, past a round obstacle to a goal.

All that a network of one's own takes, with its recipe (`recipes/reach.yaml`): the network, what a
line of the prompt file tells it, a reward, a judge. The policy is cloned from a careless teacher,
more than a third of whose demonstrations run into the obstacle. Its command clones it (a minute)
and writes the scenes that are the prompts:

    python -m benchmarks.claims.reach
    sfgrpo train benchmarks/claims/recipes/reach.yaml
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from sfgrpo.backbones import ModuleBackbone
from sfgrpo.run.alarms import better

FOLDER = Path("runs/reach")
MOVES, UNIT = 16, 0.1
"""Moves of a sample, and how long one of length 1 is: samples have a deviation of .6."""
SCENE = 5
"""Numbers of a scene: goal (x, y), obstacle (x, y, radius). Paths start at (0, 0)."""


class Policy(nn.Module):
    """Velocity of moves [B, 16, 2] at times [B], in scenes [B, 5]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(2 * MOVES + 1 + SCENE, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.last = nn.Linear(width, 2 * MOVES)

    def forward(self, x: Tensor, t: Tensor, scene: Tensor) -> Tensor:
        hidden = F.silu(self.first(torch.cat([x.flatten(1), t[:, None], scene], 1)))
        hidden = hidden + F.silu(self.second(hidden))
        hidden = hidden + F.silu(self.third(hidden))
        return self.last(hidden).view_as(x)


def load(path: str, *, device: torch.device, dtype: torch.dtype) -> ModuleBackbone:
    """The backbone that `reach.yaml` names: the policy of the file `path`."""
    policy = Policy()
    policy.load_state_dict(load_file(path))
    return ModuleBackbone(policy.to(device, dtype), shape=(MOVES, 2), encode=told)


def told(lines: Sequence[str]) -> Tensor:
    """The scenes [P, 5] of lines of the prompt file."""
    return torch.tensor([json.loads(line) for line in lines])


def paths(moves: Tensor) -> Tensor:
    """Where one is after each of the moves [..., 16, 2]."""
    return UNIT * moves.cumsum(-2)


def clearance(moves: Tensor, scenes: Tensor) -> Tensor:
    """How far paths [B, 16, 2] stay from the obstacle's edge, below 0 if they enter it: [B]."""
    distance = (paths(moves) - scenes[:, None, 2:4]).norm(dim=-1)
    return distance.amin(1) - scenes[:, 4]


class Reached:
    """From 0 to 1: near the goal at the end, and outside of the obstacle all the way."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        scenes = told(prompts)
        missed = (paths(images)[:, -1] - scenes[:, :2]).norm(dim=-1)
        return (-missed / 0.1).exp() * torch.sigmoid(clearance(images, scenes) / 0.02)


@better(spread="higher")
def judge(samples: Tensor, metadata: Sequence[Any]) -> dict[str, float]:
    """How far apart paths of one scene [P, N, 16, 2] are: a policy need not forget a way round."""
    return {"spread": float(paths(samples).std(1).norm(dim=-1).mean())}


def scenes(count: int, generator: torch.Generator) -> Tensor:
    """Random scenes [count, 5], whose obstacle is near the straight way."""
    angle, far, half, size = torch.rand(4, count, 1, generator=generator)
    goal = (0.8 + 0.4 * far) * torch.cat(
        [(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], 1
    )
    beside = 0.15 * torch.randn(count, 1, generator=generator)
    return torch.cat([goal, (0.4 + 0.2 * half) * goal + beside * _left(goal), 0.12 + 0.1 * size], 1)


def demonstrations(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Moves [B, 16, 2] of arcs to the goal, on either side and of any height, whatever is there."""
    goal, along = scenes[:, None, :2], (torch.arange(1, MOVES + 1) / MOVES)[:, None]
    height = 0.35 * torch.randn(len(scenes), 1, 1, generator=generator)
    path = goal * along + height * (math.pi * along).sin() * _left(goal)
    path = path + 0.02 * torch.randn(path.shape, generator=generator)
    return path.diff(dim=1, prepend=torch.zeros_like(path[:, :1])) / UNIT


def _left(vectors: Tensor) -> Tensor:
    return torch.stack([-vectors[..., 1], vectors[..., 0]], -1)


def cloned(steps: int = 3000, batch: int = 512, seed: int = 0) -> Policy:
    """A policy that flow matching has taught what the teacher does."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="cloning", unit="batch", dynamic_ncols=True):
        seen = scenes(batch, generator)
        moves = demonstrations(seen, generator)
        noise = torch.randn(moves.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        x = moves.lerp(noise, t[:, None, None])
        loss = F.mse_loss(policy(x, t, seen), noise - moves)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return policy


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = scenes(128, torch.Generator().manual_seed(1)).tolist()
    text = "".join(f"{json.dumps([round(number, 4) for number in line])}\n" for line in lines)
    (FOLDER / "scenes.txt").write_text(text, encoding="utf-8")
    save_file(cloned().state_dict(), FOLDER / "policy.safetensors")


if __name__ == "__main__":
    main()
