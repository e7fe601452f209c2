"""Collects what the entries measured and writes it down when the table is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest imports this file first, before tests/conftest.py sets the environment
    from benchmarks.ops.record import Record

RECORD = pytest.StashKey["Record"]()


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    from benchmarks.ops.record import Record
    from benchmarks.ops.table import ENTRIES

    return pytestconfig.stash.setdefault(RECORD, Record(ENTRIES))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash.get(RECORD, None)
    if found is not None and found.found:
        terminalreporter.write_line(f"benchmarks: {found.finish()}")
