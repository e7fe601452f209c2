"""What the references share: rows, arithmetic precision and the affine Gaussian transition.

Shapes: ``B`` rows, ``D`` elements per row (everything behind the leading dimension, flattened).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
COEFFICIENTS = ("a", "b", "n", "t")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Precision of the arithmetic: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, ...]`` -> contiguous ``[B, D]`` in ``dtype``; D may be 0, and 1 for a vector."""
    flat = tensor.contiguous().reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return flat.to(dtype)


def columns(coef: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four columns (a, b, n, t) of ``coef [B, 4]``, each ``[B, 1]``.

    Values are checked on the CPU only: on an accelerator the check would make the host wait.

    Raises:
        RuntimeError: a coefficient is not finite, n < 0, or t is outside [0, 1].
    """
    if coef.device.type == "cpu":
        _check_coefficients(coef)
    a, b, n, t = coef.to(dtype).unsqueeze(2).unbind(1)
    return a, b, n, t


def _check_coefficients(coef: Tensor) -> None:
    limits = ((-math.inf, math.inf), (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0))
    for column, (name, (low, high)) in enumerate(zip(COEFFICIENTS, limits, strict=True)):
        values = coef[:, column]
        wrong = ~(torch.isfinite(values) & (values >= low) & (values <= high))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"coef: {name} of row {row} is {float(values[row]):g}; expected finite values "
                "with n >= 0 and 0 <= t <= 1"
            )


def guided(v: Tensor, v_uncond: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    """Rows ``[B, D]`` of the velocity under classifier-free guidance, if there is any."""
    velocity = to_rows(v, dtype)
    if v_uncond is None:
        return velocity
    uncond = to_rows(v_uncond, dtype)
    return uncond + guidance * (velocity - uncond)


def gaussian_logp(x_next: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    """Mean log-density per element of ``N(mean, n^2)`` at ``x_next``: ``[B, D] -> [B]``.

    A row with n = 0 is deterministic and a row with D = 0 is empty: both get 0 by rule.
    """
    if mean.shape[1] == 0:
        return mean.new_zeros(mean.shape[0])
    noisy = n[:, 0] > 0
    scale = torch.where(noisy, n[:, 0], 1.0)
    square = (x_next - mean).square().mean(dim=1)
    logp = -square / (2.0 * scale * scale) - scale.log() - HALF_LOG_2PI
    return torch.where(noisy, logp, 0.0)
