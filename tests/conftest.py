"""Settings that must stand before PyTorch and Triton are imported; a small pipeline to train."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # pytest reads this file at the root even if only benchmarks/ is wanted, and there kernels
    # must be compiled, not interpreted, and waiting threads may spin.
    if config.getoption("benchmark_only", False):
        return
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on CPU tensors
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """With ``--benchmark-only`` nothing of tests/ is imported; None leaves it to others."""
    return True if config.getoption("benchmark_only", False) else None


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded architecture with random weights, saved as a pipeline folder."""
    import torch

    from sfgrpo.embedded import architecture

    pipeline = architecture.build_pipeline(0)
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():  # a zero output would leave adapters without a gradient
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts with the metadata that the rewards read."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
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
