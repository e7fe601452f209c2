"""Hands GPU calls to the Triton launchers, without importing Triton before the first one.

``sfgrpo.kernels.<module>.<op>`` takes the arguments of the op's schema in order, with contiguous
tensors.  CUDA covers ROCm; XPU is the third device Triton serves.  Where Triton is not installed
nothing is registered and the reference serves.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sfgrpo.ops._library import implement

KEYS = ("CUDA", "XPU")
LAUNCHERS = {
    "philox_normal": "philox",
    "sde_step": "sde_step",
    "sde_step_x0": "sde_step",
    "sde_logprob": "sde_logprob",
    "sde_logprob_backward": "sde_logprob",
    "tweedie": "tweedie",
    "gain_advantages": "gain_advantages",
    "policy_loss": "policy_loss",
    "policy_loss_backward": "policy_loss",
}
"""Op -> module of ``sfgrpo.kernels`` that launches it."""


def _lazy(op: str, module: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        launcher = getattr(importlib.import_module(f"sfgrpo.kernels.{module}"), op)
        return launcher(*(a.contiguous() if isinstance(a, Tensor) else a for a in args))

    return launch


def register_triton() -> None:
    """Register the launchers of every op, once, when ``sfgrpo.ops`` is imported."""
    if importlib.util.find_spec("triton") is None:
        return
    for op, module in LAUNCHERS.items():
        for key in KEYS:
            implement(op, _lazy(op, module), key)
