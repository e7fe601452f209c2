"""Every Triton kernel compiles for every GPU generation we name, and none of them spills.

All examples for all targets take minutes of two cores. They are compiled by whoever changes a
kernel, and what came of it is kept with a hash of the kernels' files: here that record is held
against the files as they are and against a few kernels that are compiled now, and then judged.

In subprocesses: this one interprets its kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.kernels.aot import TARGETS, examples, main, sources
from sfgrpo.kernels.machine_code import CHIPS
from sfgrpo.ops._library import DEFINITIONS

ROOT = Path(__file__).parents[2]
# Registers that leave each of the 4 warps' schedulers at least four programs to switch between
# while one waits for memory: 65,536 registers, 128 threads per program.
MOST_REGISTERS = 128
# Four programs fit into the 64 KiB of the smallest (AMD) shared memory.
MOST_SHARED = 16 * 1024

RECORD = "benchmarks/results/aot_registers.json"
RENEW = f"kernels or Triton have changed: python -m sfgrpo.kernels.aot --json {RECORD}"
NOW = ["sm_90", "gfx942"]
"""Targets of what is compiled here: of every kernel one example."""


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
    offsets: list[str]

    def printed(self) -> list[str]:
        """The columns of its line."""
        shares = ", ".join(f"{chip} {share:.2f}" for chip, share in self.shares.items())
        numbers = (self.registers, self.shared, self.spilled, self.instructions or "-")
        return [self.example, self.kernel, self.target, *map(str, numbers), shares or "-"]


def read(path: Path) -> list[Row]:
    """The rows of a saved table."""
    saved = json.loads(path.read_text())
    assert saved.keys() == {"triton", "torch", "sources", "kernels"}
    assert (saved["triton"], saved["sources"]) == (version("triton"), sources()), RENEW
    return [Row(**row) for row in saved["kernels"]]


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
def table() -> list[Row]:
    """The record of all examples for all targets."""
    return read(ROOT / RECORD)


@pytest.fixture(scope="module")
def probe(cache: Path) -> dict[str, Any]:
    """The report of `aot_probe.py`."""
    done = _run(cache, "tests/support/ops/aot_probe.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_example_was_compiled_for_every_target(table: list[Row]) -> None:
    for target in TARGETS:
        assert {row.example for row in table if row.target == target} == set(examples())


def test_what_compiles_now_is_what_is_recorded(table: list[Row], cache: Path) -> None:
    """Of every kernel the first example, printed and saved."""
    first = {row.kernel: row.example for row in reversed(table)}
    only = [argument for example in set(first.values()) for argument in ("--only", example)]
    done = _run(cache, "-m", "sfgrpo.kernels.aot", "--json", f"{cache}/now.json", *only, *NOW)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = read(cache / "now.json")
    assert {(row.kernel, row.target) for row in saved} >= {(k, t) for k in first for t in NOW}
    assert all(row in table for row in saved), RENEW
    lines = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()[1:]]
    assert lines == [row.printed() for row in saved]


def test_every_op_has_an_example(table: list[Row]) -> None:
    modules = {row.example.partition(":")[0] for row in table}
    assert modules == {definition.module for definition in DEFINITIONS.values()}
    kernels = {row.kernel for row in table}
    for op in DEFINITIONS:
        assert f"{op.rstrip('_')}_kernel" in kernels, op


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


def test_every_offset_into_a_tile_has_64_bits(table: list[Row]) -> None:
    for row in table:
        assert row.offsets == ["i64"], row


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
