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
from typing import Any

import pytest

from sfgrpo.kernels.aot import TARGETS, examples, main
from sfgrpo.kernels.machine_code import CHIPS
from sfgrpo.ops._library import DEFINITIONS

ROOT = Path(__file__).parents[2]
# Registers that leave each of the 4 warps' schedulers at least four programs to switch between
# while one waits for memory: 65,536 registers, 128 threads per program.
MOST_REGISTERS = 128
# Four programs fit into the 64 KiB of the smallest (AMD) shared memory.
MOST_SHARED = 16 * 1024

COMPLETE = ["sm_90"]
"""Here every example is compiled; for the other targets, of each kernel those that take the most
registers here: where one spills, they are the likeliest. All of them: `python -m
sfgrpo.kernels.aot`, minutes."""


@dataclass(frozen=True)
class Row:
    example: str
    kernel: str
    target: str
    registers: int
    shared: int
    spilled: int
    instructions: float | None
    shares: dict[str, float]

    @classmethod
    def read(cls, line: str) -> Row:
        example, kernel, target, registers, shared, spilled, instructions, shares = re.split(
            r"\s{2,}", line
        )
        return cls(
            example,
            kernel,
            target,
            int(registers),
            int(shared),
            int(spilled),
            None if instructions == "-" else float(instructions),
            {c: float(s) for c, s in re.findall(r"(\w[\w ]*) (\d\.\d+)", shares)},
        )


def _run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aot")


@pytest.fixture(scope="module")
def table(cache: Path) -> list[Row]:
    """The report of `python -m sfgrpo.kernels.aot`, compiled afresh."""

    def report(*arguments: str) -> list[Row]:
        done = _run(cache, "-m", "sfgrpo.kernels.aot", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        return [Row.read(line) for line in done.stdout.splitlines()[1:]]

    complete = report("--json", str(cache / "table.json"), *COMPLETE)
    only = [argument for example in _widest(complete) for argument in ("--only", example)]
    return complete + report(*only, *(target for target in TARGETS if target not in COMPLETE))


def _complete(table: list[Row]) -> list[Row]:
    return [row for row in table if row.target in COMPLETE]


def _widest(rows: list[Row]) -> set[str]:
    """Of every kernel and target the example with the most registers."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        where = row.kernel, row.target
        found[where] = max(found.get(where, row), row, key=lambda row: row.registers)
    return {row.example for row in found.values()}


@pytest.fixture(scope="module")
def probe(cache: Path, table: list[Row]) -> dict[str, Any]:
    """The report of `aot_probe.py`, which finds most of its kernels compiled."""
    done = _run(cache, "tests/support/ops/aot_probe.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_example_and_on_every_target_the_widest_compile(table: list[Row]) -> None:
    for target in TARGETS:
        rows = [row for row in table if row.target == target]
        assert {row.kernel for row in rows} == {row.kernel for row in table}
        wanted = set(examples()) if target in COMPLETE else _widest(_complete(table))
        assert {row.example for row in rows} == wanted


def test_every_op_has_an_example(table: list[Row]) -> None:
    modules = {row.example.partition(":")[0] for row in table}
    assert modules == {definition.module for definition in DEFINITIONS.values()}
    kernels = {row.kernel for row in table}
    for op in DEFINITIONS:
        assert f"{op.rstrip('_')}_kernel" in kernels, op


def test_saved_table_is_the_printed_one(table: list[Row], cache: Path) -> None:
    saved = json.loads((cache / "table.json").read_text())
    assert saved.keys() == {"triton", "torch", "kernels"}
    assert [Row(**row) for row in saved["kernels"]] == _complete(table)


def test_nothing_spills_and_occupancy_is_left(table: list[Row]) -> None:
    for row in table:
        assert row.spilled == 0, row
        assert 0 < row.registers <= MOST_REGISTERS, row
        assert row.shared <= MOST_SHARED, row


def test_instructions_stay_few(table: list[Row]) -> None:
    """An element of a long row: what was reached, and a tenth."""
    most = {"philox_normal_kernel": 65, "sde_step_kernel": 100, "tweedie_kernel": 18}
    long = [row for row in table if "16x64x64" in row.example and row.target.startswith("sm_")]
    assert {row.kernel for row in long} >= most.keys()
    for row in long:
        assert row.instructions is not None, row
        assert 0 < row.instructions <= most.get(row.kernel, 60), row


def test_rows_of_an_awkward_length_are_read_in_vectors(table: list[Row]) -> None:
    """Of 56 elements, no multiple of 16: read one by one, they took up to 250 instructions each."""
    most = {"philox_normal_kernel": 72, "sde_step_kernel": 120, "policy_loss_kernel": 104}
    short = [row for row in table if ": 56" in row.example and row.target.startswith("sm_")]
    assert {row.kernel for row in short} >= {*most, "policy_loss_backward_kernel"}
    for row in short:
        assert row.instructions is not None, row
        assert 0 < row.instructions <= most.get(row.kernel, 60), row


def test_a_share_of_a_copy_is_predicted_for_every_kernel_of_latents(table: list[Row]) -> None:
    for row in table:
        assert (row.instructions is None) == (row.kernel == "gain_advantages_kernel"), row
        chips = [] if row.instructions is None else [chip.name for chip in CHIPS[row.target]]
        assert list(row.shares) == chips, row
        assert all(0 < share <= 1 for share in row.shares.values()), row


def test_noise_has_no_fused_multiply_add_on_any_target(probe: dict[str, Any]) -> None:
    assert set(probe["fused"]) == set(TARGETS)
    for target, (separate, fused) in probe["fused"].items():
        assert separate == 0, target
        # The count sees fused instructions where the compiler may use them.
        assert fused > 0, target


def test_every_offset_into_a_tile_has_64_bits(probe: dict[str, Any], table: list[Row]) -> None:
    assert set(probe["addresses"]) == {row.kernel for row in table}
    for kernel, types in probe["addresses"].items():
        assert types == ["i64"], kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_share_is_released_by_the_thread_that_stored_it(
    probe: dict[str, Any], target: str
) -> None:
    """What finish.py rests on: store, count and, once counted, the loads, in this order."""
    order = re.compile(
        r"@(%p\d+) st\.global\.b32 .*?"
        r"@\1 atom\.global\.gpu\.acq_rel\.add\.u32 .*?"
        r"@\1 st\.shared\.b32 .*?bar\.sync.*?ld\.shared\.b32.*?"
        r"bra .*?ld\.global\.cg\.",
        re.DOTALL,
    )
    assert order.search(probe["finishing"][target])


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_a_share_is_written_back_and_stale_lines_are_dropped_on_amd(
    probe: dict[str, Any], target: str
) -> None:
    order = re.compile(
        # The same lanes (of the same wave) store the share and count.
        r"s_and_saveexec_b64 \S+ (s\[\d+:\d+\])\n(?:(?!saveexec).)*?global_store_dword .*?"
        r"s_and_saveexec_b64 \S+ \1\n.*?"
        r"buffer_wbl2 sc1\n\s*s_waitcnt vmcnt\(0\)\n\s*global_atomic_add v.*?"
        r"s_waitcnt vmcnt\(0\)\n\s*buffer_inv sc1\n.*?"
        r"ds_write_b32 .*?s_barrier\n.*?ds_read_b32 .*?global_load_dword",
        re.DOTALL,
    )
    assert order.search(probe["finishing"][target])


def test_unknown_target_and_interpreter_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sm_1"]) == 2
    assert "unknown target sm_1; known: sm_80" in capsys.readouterr().err
    assert main(["--only", "tweedy"]) == 2
    assert "unknown example 'tweedy'; known: gain_advantages: joint" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        main(["sm_80"])
