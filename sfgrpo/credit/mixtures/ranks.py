"""Each reward counts by the ranks it gives within a group: no outlier and no scale matters.

    advantage = sum_k w_k z(rank c_k) / sqrt(sum_k w_k^2)      c_k what the rule normalises
    z(rank) = (rank - (n + 1) / 2) / sqrt((n^2 - 1) / 12)      rank 1 .. n, equals share their mean

z has mean 0 and, without equals, standard deviation 1; the root keeps that for the sum of rewards
that are independent. Ranks are among all gains of a group ("joint"; "centered": once each step's
mean is gone) or among those of one step of it ("per_step"). A final reward stands at every step, as
so many equals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfgrpo.config import Credit
from sfgrpo.credit.mixtures import Rewards, centred, counted, limited, raw


def advantages(rewards: Rewards, trainable_T: Tensor, options: Credit) -> Tensor:
    """The sum of the standardised ranks, `[P, N, T]`."""
    each, scale = raw(rewards, trainable_T, options), math.hypot(*rewards.weights.values())
    ranked = [
        rewards.weights[name] / scale * _ranked(values_PNT, trainable_T, options)
        for name, values_PNT in each.items()
    ]
    return limited(torch.stack(ranked).sum(0), options)


def _ranked(values_PNT: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The standardised ranks of one reward; 0 at steps that do not enter the statistics."""
    if options.normalize == "centered":
        values_PNT = centred(values_PNT, trainable_T, options)
    steps_T, found = counted(trainable_T, options), torch.zeros_like(values_PNT)
    among = values_PNT[..., steps_T]
    if options.normalize == "per_step":
        found[..., steps_T] = standardised_ranks(among.mT).mT
    else:
        found[..., steps_T] = standardised_ranks(among.flatten(1)).view_as(among)
    return found


def standardised_ranks(values: Tensor) -> Tensor:
    """z of each value's rank among those of its row `[..., n]`."""
    n, values = values.shape[-1], values.contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    rank = (below + not_above + 1).double() / 2
    return (rank - (n + 1) / 2) / math.sqrt(max(n * n - 1, 1) / 12)
