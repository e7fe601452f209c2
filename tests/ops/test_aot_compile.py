"""Every Triton kernel compiles for every GPU generation we name, and none of them spills.

In subprocesses: this one interprets its kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfgrpo.kernels.aot import TARGETS, examples
from sfgrpo.ops._backends import LAUNCHERS

ROOT = Path(__file__).parents[2]
# Registers that leave each of the 4 warps' schedulers at least four programs to switch between
# while one waits for memory: 65,536 registers, 128 threads per program.
MOST_REGISTERS = 128
# Four programs fit into the 64 KiB of the smallest (AMD) shared memory.
MOST_SHARED = 16 * 1024


@dataclass(frozen=True)
class Row:
    example: str
    kernel: str
    target: str
    registers: int
    shared: int
    spilled: int


def _run(
    cache: Path, *arguments: str, interpreted: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The report of `python -m sfgrpo.kernels.aot`, compiled afresh."""
    done = _run(tmp_path_factory.mktemp("aot"), "-m", "sfgrpo.kernels.aot")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = []
    for line in done.stdout.splitlines()[1:]:
        example, kernel, target, *numbers = re.split(r"\s{2,}", line)
        found.append(Row(example, kernel, target, *(int(number) for number in numbers)))
    return found


def test_every_example_compiles_for_every_target(table: list[Row]) -> None:
    assert {(row.example, row.target) for row in table} == {
        (example, target) for example in examples() for target in TARGETS
    }


def test_every_op_has_an_example(table: list[Row]) -> None:
    modules = {row.example.partition(":")[0] for row in table}
    assert modules == set(LAUNCHERS.values())
    kernels = {row.kernel for row in table}
    for op in LAUNCHERS:
        stem = "sde_step" if op == "sde_step_x0" else op
        assert any(kernel.startswith(stem) for kernel in kernels), op


def test_nothing_spills_and_occupancy_is_left(table: list[Row]) -> None:
    for row in table:
        assert row.spilled == 0, row
        assert 0 < row.registers <= MOST_REGISTERS, row
        assert row.shared <= MOST_SHARED, row


def test_noise_has_no_fused_multiply_add_on_any_target(tmp_path: Path) -> None:
    done = _run(tmp_path, "tests/ops/aot_probe.py")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert set(counts) == set(TARGETS)
    for target, (separate, fused) in counts.items():
        assert separate == 0, target
        # The count sees fused instructions where the compiler may use them.
        assert fused > 0, target


def test_unknown_target_and_interpreter_are_explained(tmp_path: Path) -> None:
    done = _run(tmp_path, "-m", "sfgrpo.kernels.aot", "sm_1")
    assert done.returncode == 2
    assert "unknown target sm_1; known: sm_80" in done.stderr
    done = _run(tmp_path, "-m", "sfgrpo.kernels.aot", "sm_80", interpreted=True)
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr
