"""Scores of a pretrained model."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sfgrpo.backbones.sd3 import SD3Backbone
from sfgrpo.embedded import data
from sfgrpo.embedded.judges import classifier_accuracy
from sfgrpo.rewards import colour, ocr


@torch.no_grad()
def sample_ode(
    backbone: SD3Backbone,
    records: list[data.PromptRecord],
    *,
    num_steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Images [B, 3, H, W] of B prompts by Euler's method, the noise drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shape = backbone.latent_shape(*backbone.image_size)
    x = torch.randn(len(records), *shape, generator=generator)
    cond = backbone.encode([entry["prompt"] for entry in records])
    free = backbone.encode([""] * len(records))
    sigmas = backbone.sigmas(num_steps, shape)
    for t, s in pairwise(sigmas):
        times = t.expand(len(records))
        v = backbone.velocity(backbone.transformer, x, times, cond)
        if guidance != 1.0:
            v_free = backbone.velocity(backbone.transformer, x, times, free)
            v = v_free + guidance * (v - v_free)
        x = x + (s - t) * v
    return backbone.decode(x)


def evaluation_prompts(per_digit: int) -> list[data.PromptRecord]:
    """`per_digit` prompts of every digit, colour pairs taken in turn."""
    pairs = data.colour_pairs()
    return [
        data.record(label, *pairs[(label * per_digit + index) * 7 % len(pairs)])
        for label in range(10)
        for index in range(per_digit)
    ]


def evaluate(backbone: SD3Backbone, *, per_digit: int, guidance: float = 1.0) -> dict[str, float]:
    """Scores of 10-step samples: OCR, colour, the classifier's accuracy, OCR of every digit."""
    records = evaluation_prompts(per_digit)
    images = sample_ode(backbone, records, guidance=guidance)
    prompts = [entry["prompt"] for entry in records]
    read = ocr.build()(images, prompts, records)
    tint = colour.build()(images, prompts, records)
    labels = torch.arange(10).repeat_interleave(per_digit)
    by_digit = read.reshape(10, per_digit).mean(1).tolist()
    return {
        "ocr": float(read.mean()),
        "colour": float(tint.mean()),
        "classifier": classifier_accuracy(images, labels),
        **{f"ocr_{digit}": value for digit, value in enumerate(by_digit)},
    }
