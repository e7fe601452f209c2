"""How wrong an op may be: no more than plain PyTorch in the same precision, twice over.

The error of a fused kernel and the error of the eager reference are both measured against the
reference in float64.  Both round, in different orders, so neither is exact; a kernel that loses
more than twice what eager PyTorch loses has lost something.  The floor is for the cases where
eager happens to hit the exact value: a few roundings of the result at its own magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
ROUNDINGS = 4.0


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from float64 values; inf if either is not finite."""
    assert actual.shape == exact.shape, f"got {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    worst = (actual.double() - exact.double()).abs().max()
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")


def check(actual: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """Assert that ``actual`` is about as close to ``exact`` as ``eager`` is."""
    assert actual.dtype == eager.dtype, f"{what}: got {actual.dtype}, expected {eager.dtype}"
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    floor = ROUNDINGS * torch.finfo(actual.dtype).eps * scale
    allowed = FACTOR * error(eager, exact) + floor
    got = error(actual, exact)
    assert got <= allowed, f"{what}: error {got:.3g} exceeds {allowed:.3g} (scale {scale:.3g})"
