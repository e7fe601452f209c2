"""Collects what the entries measured; ``--resume`` goes on where a table was interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest imports this file first, before tests/conftest.py sets the environment
    from benchmarks.ops.record import Record

RECORD = pytest.StashKey["Record"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--resume",
        action="store_true",
        help="keep what an interrupted table of the ops has (benchmarks/results/"
        "ops_<device>.partial.json) and measure the rest; default: begin anew",
    )


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    from benchmarks.ops.record import Record
    from benchmarks.ops.table import ENTRIES

    record = Record(ENTRIES)
    if pytestconfig.getoption("resume"):
        try:
            record.resume()
        except ValueError as error:
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    pytestconfig.stash[RECORD] = record
    return record


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash.get(RECORD, None)
    if found is not None and found.found:
        terminalreporter.write_line(f"benchmarks: {found.finish()}")
