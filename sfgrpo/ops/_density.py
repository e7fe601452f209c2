"""The log-densities a transition may be scored by.

    gaussian      -mean_D (x_next - mean)^2 / (2 n^2) - ln n - ln(2 pi) / 2
    unnormalised  -mean_D (x_next - mean)^2                  (Flow-CPS, arXiv 2509.05952)

The second is the first at n^2 = 1/2, but for the constant ln(pi) / 2, so that one kernel serves
both: it is given that n, and the constant is added to what it returns.  Where the mean of the
squares is below 1/2 that addition is exact, hence the ratio of an unmoved policy exactly 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Density = Literal["gaussian", "unnormalised"]
HALF_LOG_PI = 0.5 * math.log(math.pi)


def is_gaussian(density: str) -> bool:
    if density not in get_args(Density):
        raise ValueError(f"density: got {density!r}, expected 'gaussian' or 'unnormalised'")
    return density == "gaussian"


def unnormalised(coef: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels take and what is to be added to their log-density per element.

    Returns:
        ``[B, 4]`` with n^2 = 1/2 on every row with noise, and ``[B]``; a row without noise or
        elements keeps its log-density of 0.
    """
    a, b, n, t = coef.unbind(1)
    noisy = n > 0
    table = torch.stack((a, b, torch.where(noisy, math.sqrt(0.5), n), t), 1)
    scored = noisy if math.prod(x.shape[1:]) else torch.zeros_like(noisy)
    # Not of two numbers alone, whose result has the default dtype's precision.
    return table, scored.to(coef.dtype) * HALF_LOG_PI


def gaussian_kl_scale(coef: Tensor) -> Tensor:
    """``[B]``: b^2 / (2 n^2), the KL divergence's factor; 0 without noise."""
    b, n = coef[:, 1], coef[:, 2]
    return torch.where(n > 0, b * b / (2 * torch.where(n > 0, n * n, 1.0)), 0.0)
