"""What a result was measured on: machine, versions, date, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.measure import device


def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def device_name() -> str:
    """The accelerator's name, or the processor's with its instruction set."""
    if device().type == "cpu":
        return f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"
    module = torch.get_device_module(device())
    return str(module.get_device_name(device()))


def slug() -> str:
    """The device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name().lower()).strip("_")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says; None where there is no git, or no repository."""
    if (git := shutil.which("git")) is None:
        return None
    done = subprocess.run(
        [git, *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def describe() -> dict[str, Any]:
    """Everything a reader of a result wants to know about where it comes from."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    # Results are written into the tree that is measured; they change no speed.
    changed = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": "unknown" if commit is None else commit + (" with changes" if changed else ""),
        "machine": {
            "device": device_name(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
    }
