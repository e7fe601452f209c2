"""Registers the compiled backends: C++ for the CPU, Triton for GPUs.

The C++ library registers itself when it is loaded: the one built into the wheel, or else one
compiled just in time (see ``csrc/build.py``).  Triton's launchers are imported by the first GPU
call: an op defined in ``sfgrpo.ops.<module>`` is launched by the function of its name in
``sfgrpo.kernels.<module>``, which takes the op's record.  CUDA covers ROCm; XPU is the third device
Triton serves.  What has no backend (Apple's MPS, float64 on a GPU) runs the reference and says so
once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfgrpo.ops._library import DEFINITIONS, REFERENCES, announce, implement, taking

KEYS = ("CUDA", "XPU")


def launcher(op: str) -> Callable[..., Any]:
    """The op's Triton launcher, as the dispatcher calls it; imports Triton."""
    definition = DEFINITIONS[op]
    module = importlib.import_module(f"sfgrpo.kernels.{definition.module}")
    return taking(definition.record, getattr(module, op))


def _lazy(op: str) -> Callable[..., Any]:
    reference, takes_float64 = REFERENCES[op], DEFINITIONS[op].float64_on_gpus
    imported = functools.cache(launcher)

    def launch(*args: Any) -> Any:
        wide = (isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        if not takes_float64 and any(wide):
            announce("float64 on GPUs")
            return reference(*args)
        return imported(op)(*args)

    return launch


def register_triton() -> None:
    """Register the launchers of every op, once, when ``sfgrpo.ops`` is imported."""
    if importlib.util.find_spec("triton") is None:
        return
    for op in DEFINITIONS:
        for key in KEYS:
            implement(op, _lazy(op), key)


def load_cpp() -> None:
    """Load the C++ library, which takes over the CPU; once, when ``sfgrpo.ops`` is imported.

    Where it is not built in and cannot be compiled, or not be loaded (from a disk mounted noexec,
    with an older libstdc++), one warning says so and the reference serves.
    """
    built_in = sorted(Path(__file__).parents[1].glob("_C.*so"))
    try:
        library = built_in[0] if built_in else _compiled()
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError) as error:
        warnings.warn(
            "sfgrpo: the C++ kernels could not be compiled or loaded, so plain PyTorch serves the "
            "ops on the CPU: same noise, 10 to 50 times slower. They take a C++17 compiler "
            "(Debian: apt install g++) and a cache that can be written and executed from "
            f"(TORCH_EXTENSIONS_DIR names another). The cause: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _compiled() -> Path:
    # Only here: a wheel with the library built in needs neither the sources nor setuptools.
    from sfgrpo.csrc.build import just_in_time

    return just_in_time()
