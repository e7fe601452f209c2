"""Facts about this machine that decide whether and how a run works; nothing is changed.

Only variables named here are read from the environment, since others may hold secrets.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from sfgrpo import launch
from sfgrpo.cores import cores

PACKAGES = (
    "sfgrpo", "torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "accelerate",
    "xformers",
)  # fmt: skip
NEEDED = ("deepspeed", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic")
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG",
)  # fmt: skip
GIB = 2**30

Facts = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that prevents training, or will disappoint."""

    what: str
    remedy: str
    fatal: bool = False


def version(package: str) -> str | None:
    """Installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """First line of the C++ compiler's own description."""
    path = shutil.which(os.environ.get("CXX", "c++"))
    if path is None:
        return None
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return told.stdout.partition("\n")[0] or path


def environment() -> tuple[Facts, list[Problem]]:
    """Versions of what a run uses."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) or "not installed" for name in PACKAGES},
        "PyTorch built for": _build(),
        "C++ compiler": compiler() or "none",
    }
    problems = []
    missing = [name for name in NEEDED if version(name) is None]
    if missing:
        what = f"training needs {', '.join(missing)}"
        problems.append(Problem(what=what, remedy='pip install ".[train]"', fatal=True))
    if torch.cuda.is_available() and version("triton") is None:
        what = "Triton is not installed: plain PyTorch serves the ops on GPUs"
        problems.append(Problem(what=what, remedy="pip install triton"))
    return facts, problems


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the C++ ops choose: they follow PyTorch's rule and its ATEN_CPU_CAPABILITY."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in ("AVX512", "AVX2") else "baseline (SSE2 or NEON)"


def devices() -> tuple[Facts, list[Problem]]:
    """Processor and accelerators."""
    facts = {
        "CPU": f"{cpu_model()}, {cores()} cores, {memory() / GIB:.1f} GiB",
        "instruction set": instruction_set(),
    }
    problems = []
    gpus = range(torch.cuda.device_count())
    for index in gpus:
        p = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = (
            f"{p.name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), capability "
            f"{p.major}.{p.minor}"
        )
        if free < 0.9 * total:
            what = f"cuda:{index}: {(total - free) / GIB:.1f} GiB are taken by other processes"
            problems.append(Problem(what=what, remedy="see `nvidia-smi` for which"))
    if gpus:
        facts["driver"] = _driver()
    if len(gpus) > 1:
        able = torch.cuda.can_device_access_peer
        pairs = [able(a, b) for a in gpus for b in gpus if a != b]
        facts["peer access"] = f"{sum(pairs)} of {len(pairs)} pairs of GPUs"
    elif not gpus:
        facts["GPU"] = "none"
    if not gpus and shutil.which("nvidia-smi"):
        what = "there is an NVIDIA driver, but PyTorch sees no GPU"
        remedy = "check CUDA_VISIBLE_DEVICES, and that PyTorch is a CUDA build the driver supports"
        problems.append(Problem(what=what, remedy=remedy))
    return facts, problems


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False)
    return told.stdout.partition("\n")[0] or "unknown"


def distributed() -> tuple[Facts, list[Problem]]:
    """How processes would find each other and talk."""
    present = {
        name: available()
        for name, available in (("nccl", dist.is_nccl_available), ("gloo", dist.is_gloo_available))
    }
    facts = {
        "backends": ", ".join(name for name, there in present.items() if there) or "none",
        "launched as": _launched(),
        **{name: os.environ[name] for name in LAUNCHED if name in os.environ},
    }
    problems, needed = [], "nccl" if torch.cuda.is_available() else "gloo"
    if not present[needed]:
        what = f"this PyTorch has no {needed}, which several processes need to talk"
        problems.append(Problem(what=what, remedy="install a PyTorch wheel from pytorch.org"))
    for what in launch.misread():
        remedy = "unset it, or start by deepspeed or torchrun, which set it"
        problems.append(Problem(what=what, remedy=remedy, fatal=True))
    address = os.environ.get("MASTER_ADDR")
    if address:
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            what = f"MASTER_ADDR is '{address}', which this machine cannot resolve"
            remedy = "use an address that every node can reach"
            problems.append(Problem(what=what, remedy=remedy, fatal=True))
    return facts, problems


def _launched() -> str:
    if "RANK" not in os.environ:
        return "one process"
    return f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"


def disk(folder: Path, needed: int) -> tuple[Facts, list[Problem]]:
    """Space where the run would write `needed` bytes."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = f"run.output_dir: '{place}' is no folder"
        remedy = "choose another run.output_dir"
        return {"output folder": str(folder)}, [Problem(what=what, remedy=remedy, fatal=True)]
    free = shutil.disk_usage(place).free
    facts = {"output folder": str(folder), "free": f"{free / GIB:.1f} GiB"}
    if needed:
        facts["checkpoints take"] = f"about {needed / GIB:.2f} GiB"
    problems = []
    if not os.access(place, os.W_OK):
        remedy = "choose another run.output_dir"
        problems.append(Problem(what=f"cannot write to {place}", remedy=remedy, fatal=True))
    if needed > free:
        what = f"checkpoints take {needed / GIB:.2f} GiB, {free / GIB:.1f} GiB are free in {place}"
        remedy = "lower checkpoint.keep, or choose another run.output_dir"
        problems.append(Problem(what=what, remedy=remedy, fatal=True))
    return facts, problems
