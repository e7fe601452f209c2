"""How the C++ kernels are compiled: the same flags for wheels and for just-in-time builds.

The sources use LibTorch's stable ABI only, so one binary serves every Python >= 3.10 and every
PyTorch >= 2.10, and compiling takes seconds.  PyTorch is optional while a wheel is built: without
it the wheel carries the sources only, and they are compiled when they are first needed.

The just-in-time build calls the compiler itself instead of ``torch.utils.cpp_extension.load``:
that one needs ninja on the PATH and leaves a lock behind when it is killed, on which every later
process waits forever.  Here the folder's name is a hash of all inputs and the library appears by
an atomic rename, so any number of processes may build at once; that one of them does and the
others wait is a lock of the system's, which ends with its process.  The library's digest stands
beside it: one that a crash or a full disk cut short is compiled anew, and never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_build_ext: Any
try:
    from setuptools.command.build_ext import build_ext as _build_ext
except ModuleNotFoundError:  # only a wheel's build needs it, not the one just in time
    _build_ext = object

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cpp"))
HEADERS = sorted(HERE.glob("*.h"))

MACROS = {
    "TORCH_TARGET_VERSION": "0x020a000000000000",  # the stable ABI of PyTorch 2.10
    "Py_LIMITED_API": "0x030a0000",
}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    # No fused multiply-adds: the noise has the same bits on every instruction set and backend.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)

# The generator is long chains of latency: 10 % faster when the compiler interleaves them.  Clang
# does so unasked and may not know the options.
GCC_FLAGS = ("-fschedule-insns", "-fsched-pressure")


def _compiler() -> list[str] | None:
    """The command of CXX, which may have arguments or be a wrapper's (``ccache g++``)."""
    words = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return words if shutil.which(words[0]) else None


def _flags(compiler: list[str] | None) -> list[str]:
    if compiler is None:
        return list(FLAGS)
    probe = [*compiler, *GCC_FLAGS, "-fsyntax-only", "-x", "c++", os.devnull]
    known = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return [*FLAGS, *GCC_FLAGS] if known else list(FLAGS)


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _torch_arguments(torch_folder: Path) -> tuple[list[str], list[str]]:
    """(compiler's, linker's) arguments that point at an installed PyTorch."""
    library = torch_folder / "lib"
    return [f"-I{torch_folder / 'include'}"], [f"-L{library}", "-ltorch_cpu", "-lc10"]


class build_ext(_build_ext):
    """Fills in the sources and flags of ``sfgrpo._C``, or drops it where PyTorch is missing."""

    def finalize_options(self) -> None:
        super().finalize_options()
        folder = _torch_folder()
        if folder is None or platform.system() == "Windows":
            self.extensions = []
            return
        compile_args, link_args = _torch_arguments(folder)
        for extension in self.extensions:
            extension.sources = [os.path.relpath(source) for source in SOURCES]
            extension.depends = [os.path.relpath(header) for header in HEADERS]
            extension.define_macros = list(MACROS.items())
            extension.extra_compile_args = [*_flags(_compiler()), *compile_args]
            extension.extra_link_args = link_args


def _cache() -> Path:
    """PyTorch's own cache of extensions, in a folder named by everything the binary depends on."""
    import torch

    digest = hashlib.sha256(f"{FLAGS}{MACROS}{torch.__version__}{platform.machine()}".encode())
    for path in (*SOURCES, *HEADERS):
        digest.update(path.read_bytes())
    return _cache_root() / f"sfgrpo_{digest.hexdigest()[:16]}"


def _cache_root() -> Path:
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def just_in_time() -> Path:
    """Path of the compiled library; compiles it first (about 20 s on one core) if needed.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed; the message holds its output.  Or
            there is no home that could hold the cache.
        OSError: the cache cannot be written.
    """
    library = _cache() / "libsfgrpo.so"
    if _whole(library):
        return library
    compiler = _compiler()
    folder = _torch_folder()
    if compiler is None or folder is None:
        raise RuntimeError("no C++ compiler found (CXX, or c++ on the PATH)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with _alone(library.parent.with_suffix(".lock")):
        if not _whole(library):  # another process, such as a rank beside this one, may have done it
            print("sfgrpo: compiling the C++ kernels, once", file=sys.stderr, flush=True)
            _build(library, compiler, folder)
    return library


def _build(library: Path, compiler: list[str], torch_folder: Path) -> None:
    """Compile `library`; it and its digest appear whole or not at all."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = _compile(compiler, torch_folder, Path(scratch))
        digest = _digest_of(library)
        digest_built = Path(scratch) / digest.name
        digest_built.write_text(_digest(built))
        for file, target in ((digest_built, digest), (built, library)):
            _sync(file)  # else a crash may leave the name without the data
            os.replace(file, target)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here; where the system has no such lock, or its disk has
    none, all are, and do the same work."""
    with path.open("w") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _whole(library: Path) -> bool:
    """Whether it is there as it was compiled."""
    digest = _digest_of(library)
    return library.exists() and digest.exists() and digest.read_text() == _digest(library)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _compile(compiler: list[str], torch_folder: Path, scratch: Path) -> Path:
    compile_args, link_args = _torch_arguments(torch_folder)
    macros = [f"-D{name}={value}" for name, value in MACROS.items()]
    flags = _flags(compiler)
    objects = [scratch / f"{source.stem}.o" for source in SOURCES]
    running = [
        subprocess.Popen(
            [*compiler, *flags, *macros, *compile_args, "-fPIC", "-c", source, "-o", target],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    outputs = [process.communicate()[1] for process in running]
    failed = [text for process, text in zip(running, outputs, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(f"{shlex.join(compiler)} failed:\n{failed[0]}")
    built = scratch / "libsfgrpo.so"
    link = subprocess.run(
        [*compiler, "-shared", *objects, *link_args, "-o", built], capture_output=True, text=True
    )
    if link.returncode:
        raise RuntimeError(f"{shlex.join(compiler)} failed to link:\n{link.stderr}")
    return built


if __name__ == "__main__":  # before anything imports the package: see the Makefile
    try:
        just_in_time()
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"csrc: {error}") from None
