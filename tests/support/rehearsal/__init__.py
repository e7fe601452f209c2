"""Runs our code as on a GPU where there is none. Importing this makes the process one that has it.

    python -m tests.support.rehearsal train embedded --run.iterations 1
    python -m tests.support.rehearsal.families

Tensors say that they are on cuda:0, `torch.cuda` says that it is there, a process group that its
backend is NCCL; Triton's kernels run in its interpreter, PyTorch's own on the CPU, over the same
memory. What a GPU refuses is refused: operands of two devices, a device's tensor given to NumPy or
to the host's code, a host's tensor given to NCCL. Nothing else of a GPU is here: no time, no
streams, no limits of memory, and the numbers are the CPU's.
"""

from __future__ import annotations

import ctypes
import os

from tests.support.rehearsal.build import library


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)  # before PyTorch looks whether there is CUDA
    from tests.support.rehearsal import device, nccl  # before anybody asks PyTorch

    device.install()
    nccl.install()


_begin()
