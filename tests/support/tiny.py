"""A run small enough for tests: a pipeline with random weights, five prompts, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

SMALL = {
    "run.iterations": "3",
    "reward": "{'tests.support.rewards:Redness': 1}",
    "sample.prompts_per_iteration": "2",
    "sample.group_size": "4",
    "sample.num_steps": "4",
    "sample.window": "null",
    "sample.batch_size": "8",
    "model.decode_batch": "5",
    "credit.solver": "euler",
    "credit.solver_options": "{substeps: 2}",
    "lora": "{rank: 32, alpha: 64}",
    "train.updates_per_iteration": "1",
    "train.micro_batch_size": "5",
    "train.beta": "0.01",
    "eval": "{every: 1, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
    "checkpoint": "{every: 1, keep: 2}",
}
"""What it changes of the recipe "embedded"."""


def build_pipeline(folder: Path) -> Path:
    """Save the embedded architecture, half as deep, with random weights as a pipeline folder."""
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from sfgrpo.embedded import architecture

    pipeline = architecture.build_pipeline(0)
    shallow = {**pipeline.transformer.config, "num_layers": 2}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(shallow))
    architecture.initialise(pipeline.transformer)
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():  # a zero output would leave adapters without a gradient
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(folder)
    return folder


def write_prompts(path: Path) -> Path:
    """Five prompts with the metadata that the rewards read."""
    words = {"1": "one", "3": "three", "5": "five", "7": "seven", "9": "nine"}
    records = [
        {
            "prompt": f"a white {word} on a red background",
            "text": digit,
            "foreground": "white",
            "background": "red",
        }
        for digit, word in words.items()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
