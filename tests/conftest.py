"""Settings that must stand before PyTorch and Triton are imported; a small pipeline to train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny

SLOW = ("ops/test_aot_compile.py", "ops/test_dispatch.py", "ops/test_triton_*.py")
"""Slow as a whole: ops are compiled, for every GPU and in graphs, or interpreted by the element."""

LONGEST = (
    "engine/test_zero.py", "test_trainer.py", "backbones/test_families.py", "test_update.py",
    "run/test_stopping.py", "test_recipes.py", "doctor/test_published.py", "doctor/test_doctor.py",
    "ops/test_aot_compile.py", "test_rehearsal.py", "engine/test_nodes.py", "run/test_failing.py",
    "backbones/test_experts.py", "backbones/test_context.py", "ops/test_dispatch.py",
    "test_embeddings.py", "embedded/test_embedded.py", "compare/test_runs.py", "test_score.py",
)  # fmt: skip
"""Started first where several processes share the tests: one of them, left to the end, would run
alone. A file that is missing here costs time, and nothing else."""


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.match(f"tests/{pattern}") for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes; each sorts alike
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """When the test's file is started: its place among the longest, or after them all."""
    found = (i for i, name in enumerate(LONGEST) if item.path.match(f"tests/{name}"))
    return next(found, len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _linear_layers() -> Iterator[None]:
    """DeepSpeed's stage 3 replaces PyTorch's for the whole process, and for good; its own keep
    other tensors and round otherwise."""
    import torch

    kept = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = kept


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded architecture with random weights, saved as a pipeline folder."""
    return tiny.build_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts with the metadata that the rewards read."""
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def recipe(pipeline_folder: Path, prompt_file: Path):
    """Makes recipes of small runs: `recipe(folder, sample__eta="0.5")`."""
    from sfgrpo import config

    def make(folder: Path, **changes: str) -> config.Recipe:
        keys = {
            **tiny.SMALL,
            "model.path": str(pipeline_folder),
            "prompts": str(prompt_file),
            "run.output_dir": str(folder),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return config.load("embedded", list(keys.items()))

    return make
