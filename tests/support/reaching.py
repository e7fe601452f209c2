"""A small velocity network of one's own, a robot's policy, and a run of it: its process starts in a
third of the time that one with a pipeline takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfgrpo import config
from sfgrpo.backbones import ModuleBackbone

ACTIONS, JOINTS = 4, 2


class Policy(nn.Module):
    """Velocity of a chunk of actions [B, 4, 2], given where the goal is [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        size = ACTIONS * JOINTS
        self.inner = nn.Linear(size + 3, 64)
        self.outer = nn.Linear(64, size)

    def forward(self, x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(torch.cat([x.flatten(1), t[:, None], goal], 1)))
        return self.outer(hidden).view_as(x)


def load(path: str | Path, **options: Any) -> ModuleBackbone:
    """Backbone "tests.support.reaching:load"."""
    torch.manual_seed(0)
    policy = Policy().to(options["device"], options["dtype"])
    if Path(path).is_file():
        policy.load_state_dict(load_file(path))

    def goals(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([json.loads(prompt) for prompt in prompts])

    return ModuleBackbone(
        policy, shape=(ACTIONS, JOINTS), encode=goals, lora_targets=("inner", "outer")
    )


def bare(path: str, *, device: torch.device, dtype: torch.dtype) -> Policy:
    """No backbone."""
    return Policy().to(device, dtype)


class Reaches:
    """Minus the distance between where the actions end and the goal."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        goal = torch.tensor([json.loads(prompt) for prompt in prompts])
        return -(images.sum(1) - goal).norm(dim=-1)


def spread(samples: Tensor, metadata: Sequence[Any]) -> dict[str, float]:
    """A judge: samples come as they were decoded, [P, N, 4, 2]."""
    assert samples.shape[2:] == (ACTIONS, JOINTS)
    return {"spread": float(samples.std(1).mean())}


def keys(tmp_path: Path, **changes: str) -> dict[str, str]:
    """What a small run changes of the recipe "embedded", written to `tmp_path / "run"`."""
    goals = tmp_path / "goals.txt"
    goals.write_text("[1.0, 0.0]\n[0.0, -1.0]\n[-0.5, 0.5]\n")
    return {
        "model": "{backbone: 'tests.support.reaching:load', path: none}",
        "prompts": str(goals), "reward": "{'tests.support.reaching:Reaches': 1}",
        "run": f"{{output_dir: {tmp_path / 'run'}, iterations: 15}}",
        "sample.num_steps": "4", "sample.window": "null",
        "sample.prompts_per_iteration": "3", "sample.group_size": "16",
        "train": "{learning_rate: 3e-3, clip_range: 0.05, beta: 0, updates_per_iteration: 2}",
        "eval": "{every: 15, prompts: 3, images_per_prompt: 32, num_steps: 4,"
                " judges: ['tests.support.reaching:spread']}",
        "checkpoint": "{every: 15}",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }  # fmt: skip


def recipe(tmp_path: Path, **changes: str) -> config.Recipe:
    return config.load("embedded", list(keys(tmp_path, **changes).items()))
