"""The benchmark table: every contender returns what it should, and the bookkeeping is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ops import host, machine, measure, predictions, ratios
from benchmarks.ops.operands import Transition
from benchmarks.ops.shapes import BF16, FP32, Precision, Shape
from benchmarks.ops.table import (
    BY_TITLE,
    COMPILE,
    ENTRIES,
    HAND,
    IN_PLACE,
    OURS,
    PEERS,
    ROWS,
    Entry,
)
from benchmarks.ops.verify import check, runner
from sfgrpo import ops
from tests.support.entries import tiny

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CALLS = [(row.title, name) for row in ROWS for name in row.calls if name != COMPILE]


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda precision: precision.name)
@pytest.mark.parametrize(("title", "name"), CALLS)
def test_contender_returns_what_the_published_form_does(
    title: str, name: str, precision: Precision
) -> None:
    run = runner(tiny(title, name, precision), CPU)
    for _ in range(3):  # in place, on what the call before has left
        assert all(bool(torch.isfinite(result).all()) for result in run())


@pytest.mark.parametrize("title", list(BY_TITLE))
def test_wrong_results_are_noticed(title: str) -> None:
    entry = tiny(title, OURS)
    given = entry.row.operands(entry.shape, entry.precision, CPU)
    if entry.row.draws:
        given = replace(given, noise=None)
    right = runner(entry, CPU)()
    for wrong in range(len(right)):
        results = tuple(1.01 * r if k == wrong else r for k, r in enumerate(right))
        with pytest.raises(AssertionError, match=r"differs by"):
            check(entry.row, OURS, entry.row.operands(entry.shape, FP32, CPU), results)


def test_noise_that_is_not_standard_normal_is_noticed() -> None:
    row = BY_TITLE["philox_normal"]
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match=r"noise has mean 0\.5"):
        check(row, PEERS, None, (uniform,))


TRAFFIC = re.compile(r"^\s*Traffic per element \(fp32\)(, backward)?: (\d+) bytes", re.MULTILINE)


def documented(function: str) -> dict[str, int]:
    """Bytes per element by direction ("" or ", backward"), from an op's docstring."""
    return {way: int(n) for way, n in TRAFFIC.findall(getattr(ops, function).__doc__)}


@pytest.mark.parametrize("title", [row.title for row in ROWS if "given" not in row.title])
def test_the_docstrings_state_the_traffic_of_the_table(title: str) -> None:
    row = BY_TITLE[title]
    stated = documented(row.op)
    total = stated[""] + stated[", backward"] if row.backward else stated[""]
    assert row.bytes_per_element(FP32) == total


@pytest.mark.parametrize("op", ["sde_step", "tweedie"])
def test_in_place_moves_as_many_bytes(op: str) -> None:
    assert documented(f"{op}_") == documented(op)


def test_bytes_of_known_entries() -> None:
    assert tiny("sde_step", OURS).bytes == 5 * 30 * (4 + 4 + 4)
    assert tiny("sde_step", OURS, BF16).bytes == 5 * 30 * (4 + 2 + 4)
    assert tiny("policy_loss+backward", OURS, BF16).bytes == 5 * 30 * (2 * (4 + 2 + 4 + 2) + 2)
    assert tiny("gain_advantages", OURS).bytes == 5 * 4 * (5 + 4) * 4
    assert tiny("philox_normal", OURS).bytes == 5 * 30 * 4


def test_names_are_unique_and_groups_hold_one_comparison() -> None:
    assert len({str(entry) for entry in ENTRIES}) == len(ENTRIES)
    for group in {entry.group for entry in ENTRIES}:
        names = [entry.implementation for entry in ENTRIES if entry.group == group]
        assert len(set(names)) == len(names)
        assert {PEERS, OURS} <= set(names)


def test_peak_memory_of_known_allocations() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        third = torch.empty(2000)  # 1000 floats were given back, so the peak is 3000 + 2000
        del second
        return third

    assert measure.peak_memory_of_cpu(call) == 5000 * 4


@pytest.mark.parametrize(("name", "latents"), [(PEERS, 4), (HAND, 2), (OURS, 1), (IN_PLACE, 0)])
def test_peak_memory_sees_what_the_kernels_allocate(name: str, latents: int) -> None:
    shape = Shape("large rows", 2, (8, 32, 32))
    row = BY_TITLE["policy_loss+backward"]
    entry = Entry(row=row, shape=shape, precision=FP32, implementation=name)
    peak = measure.peak_memory_of_cpu(runner(entry, CPU)) / (4 * shape.elements)
    # Published code keeps what autograd saves, at least four latents at a time.
    assert latents <= peak < (latents + 0.05 if name != PEERS else 10)


class FakeEvent:
    """An accelerator's event: milliseconds on a clock that each recording moves."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1.5
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


def test_events_are_subtracted_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        Event = FakeEvent

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    start = measure.Instant()
    assert measure.Instant() - start == pytest.approx(1.5e-3)


def test_the_timed_interval_begins_behind_the_flush_and_the_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream: list[str] = []

    class Event(FakeEvent):
        def record(self) -> None:
            stream.append("event")
            super().record()

    class Buffer:
        def zero_(self) -> None:
            stream.append("flush")

    class Module:
        pass

    monkeypatch.setattr(Module, "Event", Event, raising=False)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append(f"spin {cycles}"))
    monkeypatch.setattr(measure, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(measure, "_flush_buffer", Buffer)
    measure.seconds(lambda: stream.append("call"))
    assert stream == ["flush", f"spin {measure.SPIN_CYCLES}", "event", "call", "event"]


def test_a_machine_without_git_has_an_unknown_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.describe()["commit"] == "unknown"


def test_predictions_follow_their_formula() -> None:
    assert set(predictions.COSTS) == set(BY_TITLE)
    shape = Shape("one gigabyte", 1, (250_000_000,))
    chip = predictions.Chip("round", copy_bandwidth=1e12, processors=100, clock=1e9)
    step = predictions.predict(BY_TITLE["sde_step"], shape, FP32, chip)
    assert step.memory == pytest.approx(3e-3)
    assert step.arithmetic == pytest.approx(250e6 * 79 / (128 * 100 * 1e9))
    assert step.total == pytest.approx(3e-3 + step.stages * predictions.GAP)
    credit = predictions.predict(BY_TITLE["gain_advantages"], Shape("tiny", 1, (1, 2)), FP32, chip)
    assert credit.total == pytest.approx(predictions.GAP + 4 * predictions.SUM, rel=1e-3)


def test_host_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [BY_TITLE[title] for title in ("policy_loss+backward", "gain_advantages")]
    monkeypatch.setattr(host, "ROWS", rows)
    threads = torch.get_num_threads()
    try:
        host.main(["--rounds", "3", "--json", str(tmp_path / "host.json")])
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out.splitlines()
    results = json.loads((tmp_path / "host.json").read_text())["results"]
    assert [result["row"] for result in results] == [row.title for row in rows]
    assert len(shown) == 1 + len(rows)
    for row, result in zip(rows, results, strict=True):
        found = result["p20_p50_p80_us"]
        assert set(found) == {*row.calls, *([host.FLOOR] if row.backward else [])} - {COMPILE}
        assert all(0 < low <= middle <= high for low, middle, high in found.values())
    loss = results[0]["p20_p50_p80_us"]
    assert loss[host.FLOOR][0] < loss[OURS][0] < loss[PEERS][0]


def test_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        ratios.main(
            ["philox_normal", "--shape", "embedded", "--threads", "1", "--rounds", "2"]
            + ["--json", str(tmp_path / "ratios.json")]
        )
    finally:
        torch.set_num_threads(threads)
    assert "philox_normal" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "ratios.json").read_text())["results"]
    assert set(result["peak_bytes"]) == {PEERS, OURS, "copy"}


def test_claims_are_ratios_of_the_right_things() -> None:
    times = {PEERS: [8.0, 9.0], COMPILE: [3.0, 3.0], OURS: [1.0, 1.5], "copy": [0.5, 0.75]}
    peaks = {PEERS: 100, COMPILE: 60, OURS: 20, "copy": 0}
    results = [ratios.Result(row, 2, times, peaks) for row in ROWS]
    texts = ratios.claims(results)
    assert len(texts) == len(ratios.CLAIMS)
    assert texts[0].startswith("2 threads: 7.00 ")
    assert next(text for text in texts if "bandwidth: tweedie" in text).startswith(
        "2 threads: 0.50"
    )
    assert texts[-1] == "2 threads: 0.200  of eager autograd's peak memory"


def test_ratios_refuse_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tweedy"], ["tweedie", "--shape", "48x24x11"]):
        with pytest.raises(SystemExit):
            ratios.main(arguments)
    assert "tweedy" in capsys.readouterr().err


def test_operands_are_the_same_in_every_process() -> None:
    entry = tiny("sde_step", OURS)
    given = entry.row.operands(entry.shape, FP32, CPU)
    assert isinstance(given, Transition)
    assert given.noise is not None
    assert torch.equal(given.noise, runner(tiny("philox_normal", OURS), CPU)()[0])


@pytest.mark.slow
def test_the_command_at_the_root_runs_the_table_alone() -> None:
    """Two entries of it; tests/ is not collected."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark-only", "-k", "philox_normal and embedded"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 of {len(ENTRIES)} entries ran" in done.stdout
    assert f"2 passed, {len(ENTRIES) - 2} deselected" in done.stdout


@pytest.mark.parametrize("only", [True, False])
def test_triton_is_interpreted_in_tests_only(monkeypatch: pytest.MonkeyPatch, only: bool) -> None:
    from tests import conftest

    class Config:
        def getoption(self, name: str, default: bool) -> bool:
            return only if name == "benchmark_only" else default

    config: Any = Config()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    conftest.pytest_configure(config)
    assert os.environ.get("TRITON_INTERPRET") == (None if only else "1")
    assert conftest.pytest_ignore_collect(config) is (True if only else None)
