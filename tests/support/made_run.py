"""The folder of a run that never was, for what reads runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image


def make_run(folder: Path, rule: str, rewards: list[float]) -> Path:
    (folder / "images").mkdir(parents=True)
    metrics = [
        {
            "iteration": k + 1, "reward": r, "kl": 0.1 * k, "clip_fraction": 0.0, "grad_norm": 1.0,
            "logp_drift_max": 1e-6, "reward_per_state": [0.1, r], "gain_per_step": [r],
            "cost": {"velocity": 2340 + k, "gradient": 864, "decoded": 872, "scored": 872},
        }
        for k, r in enumerate(rewards[1:])
    ]  # fmt: skip
    evals = [{"iteration": k, "reward": r, "judge": 1 - r} for k, r in enumerate(rewards)]
    for name, rows in {"metrics": metrics, "eval": evals}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases = {"rollout": 1.5, "communication": 0.0, "waiting": 0.25, "train": 0.5}
    timing = {
        "iteration": 1, "seconds": 2.25, "images_per_second": 4.0,
        "phases": phases, "share": {}, "slowest": {**phases, "waiting": 0.5},
    }  # fmt: skip
    (folder / "timing.jsonl").write_text(json.dumps(timing) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"credit": {"rule": rule}, "note": "<b>"}))
    for k in (0, len(rewards) - 1):
        Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(
            folder / "images" / f"{k:06d}.png"
        )
    (folder / "images" / "prompts.txt").write_text("a cat\na dog\n")
    return folder
