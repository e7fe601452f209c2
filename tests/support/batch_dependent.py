"""Velocities that depend on the batch's size, as a GPU's do, and training through them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfgrpo.backbones import Backbone, Conditioning
from sfgrpo.config import Recipe

RELATIVE = 2e-3
"""Relative difference of two velocities, as of bf16 on a GPU."""


def perturb(backbone: Backbone, relative: float = RELATIVE) -> None:
    """From now on the velocities of a batch are off by noise of this relative size, which depends
    on the shape of the batch and the row's place in it, and on nothing else."""
    plain = backbone.velocity

    def velocity(transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        v = plain(transformer, x, t, cond)
        draw = torch.Generator().manual_seed(len(x))
        noise = torch.randn(v.shape, generator=draw).to(v.device)
        return v + relative * v.detach().square().mean().sqrt() * noise

    backbone.velocity = velocity  # pyright: ignore[reportAttributeAccessIssue]


def train(recipe: Recipe) -> None:
    """What each rank runs: the recipe, through such a network."""
    from sfgrpo.trainer import Trainer

    trainer = Trainer(recipe)
    perturb(trainer.backbone)
    trainer.train()
