"""The ops as users call them, on the best device of this machine, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.ops import device_graph


def test_device_check() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.device_check"],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    good = done.stdout.count("ok ")
    assert good == 38 + len(device_graph.CHECKS) - done.stdout.count("skipped ")
