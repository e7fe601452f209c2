"""Fused operators of the method, in the ``sfgrpo`` namespace of ``torch.library``.

Each module holds one op: its equation, its schema, its plain-PyTorch reference (the
specification), its fake kernel and its autograd formula.  Which backend runs is the dispatcher's
business: C++ on the CPU, Triton on GPUs, the reference everywhere else.
"""

from __future__ import annotations

from sfgrpo.ops._backends import load_cpp, register_triton
from sfgrpo.ops._density import Density
from sfgrpo.ops._policy_checks import Ratio
from sfgrpo.ops.drop_in import sde_step_with_logprob
from sfgrpo.ops.gain_advantages import (
    NORMALIZATIONS,
    Normalization,
    gain_advantages,
    gain_advantages_,
)
from sfgrpo.ops.philox import philox_normal
from sfgrpo.ops.policy_loss import PolicyLoss, PolicyStats, policy_loss
from sfgrpo.ops.sde_logprob import Reduction, sde_logprob
from sfgrpo.ops.sde_step import sde_step, sde_step_, sde_step_x0, sde_step_x0_
from sfgrpo.ops.tweedie import tweedie, tweedie_

__all__ = [
    "NORMALIZATIONS",
    "Density",
    "Normalization",
    "PolicyLoss",
    "PolicyStats",
    "Ratio",
    "Reduction",
    "gain_advantages",
    "gain_advantages_",
    "philox_normal",
    "policy_loss",
    "sde_logprob",
    "sde_step",
    "sde_step_",
    "sde_step_with_logprob",
    "sde_step_x0",
    "sde_step_x0_",
    "tweedie",
    "tweedie_",
]

load_cpp()
register_triton()
