"""Output whose reader is gone goes nowhere, and nothing fails; other failures are told."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfgrpo.run.output import Lasting

PRINTS = """
import os, sys
from pathlib import Path
from tqdm import tqdm
from sfgrpo.run.output import lasting

input()  # the reader is gone by now
with lasting():
    for _ in tqdm(range(3), miniters=1, mininterval=0):
        print("a reward prints", flush=True)
        os.write(2, b"so does C++")
    print("still buffered")
Path(sys.argv[1]).touch()
"""


def test_a_bar_and_prints_go_on_without_a_reader(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "done")],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_no_reader_that_went() -> None:
    with pytest.raises(OSError, match="No space left"):
        Lasting(Full()).flush()
