"""Scores of a pretrained model."""

from __future__ import annotations

import operator
from itertools import pairwise

import torch
from torch import Tensor

from sfgrpo.backbones.sd3 import SD3Backbone
from sfgrpo.embedded import data
from sfgrpo.embedded.judges import classifier_accuracy
from sfgrpo.embedded.task import DIGIT, Task
from sfgrpo.rewards import colour, line, ocr

STRIDE = 37
"""Prime to 10: from one number to the next of those that are asked for."""


@torch.no_grad()
def sample_ode(
    backbone: SD3Backbone,
    records: list[data.PromptRecord],
    *,
    task: Task = DIGIT,
    num_steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Images [B, 3, H, W] of B prompts by Euler's method, the noise drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shape = backbone.latent_shape(task.height, task.width)
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


def evaluation_prompts(per_digit: int, task: Task = DIGIT) -> list[data.PromptRecord]:
    """`per_digit` prompts of texts that begin with each digit, colour pairs taken in turn."""
    pairs = data.colour_pairs()
    following = 10 ** (task.digits - 1)
    return [
        data.record(
            task.texts[label * following + index * STRIDE % following],
            *pairs[(label * per_digit + index) * 7 % len(pairs)],
            task,
        )
        for label in range(10)
        for index in range(per_digit)
    ]


def evaluate(
    backbone: SD3Backbone, *, per_digit: int, guidance: float = 1.0, task: Task = DIGIT
) -> dict[str, float]:
    """Scores of 10-step samples: OCR, colour, how often OCR and the classifier read what was asked,
    OCR of the images in which a digit was asked for."""
    records = evaluation_prompts(per_digit, task)
    images = sample_ode(backbone, records, task=task, guidance=guidance)
    prompts, texts = ([entry[key] for entry in records] for key in ("prompt", "text"))
    read = (ocr if task.digits == 1 else line).build()(images, prompts, records)
    tint = colour.build()(images, prompts, records)
    found = ocr.Recogniser(threads=2, batch=64).read(images)
    by_digit = {
        f"ocr_{digit}": float(read[[str(digit) in text for text in texts]].mean())
        for digit in range(10)
    }
    return {
        "ocr": float(read.mean()),
        "colour": float(tint.mean()),
        "classifier": classifier_accuracy(images, texts, task),
        "right": sum(map(operator.eq, found, texts)) / len(texts),
        **by_digit,
    }
