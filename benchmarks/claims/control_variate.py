"""Stepwise credit whose gains leave out what the reward before the step foretells.

A state that scores high by luck falls back in its next step, whatever that step did: within a
group, gains regress on the rewards before them. That part says nothing of the step and is a control
variate, with one slope for a step over all prompts. Tried beyond the paper (`credit_rules.yaml`).
"""

from __future__ import annotations

from torch import Tensor

from sfgrpo import credit, ops
from sfgrpo.config import Credit
from sfgrpo.credit import block_states, statistics_mask
from sfgrpo.credit.stepwise import block_gains, with_gains


def surprises(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The gain of each step less what the reward before it foretells, both centred in their group,
    `[P, N, T]`."""
    start_T, _ = block_states(trainable_T, options)
    before_PNT = rewards_PNS[..., start_T]
    gain_PNT = block_gains(rewards_PNS, trainable_T, options)
    before_PNT, gain_PNT = (part - part.mean(1, keepdim=True) for part in (before_PNT, gain_PNT))
    variance_T = (before_PNT * before_PNT).sum((0, 1))
    # Only falling back: a slope above 0 would be a step that widens differences, hence its own.
    slope_T = ((before_PNT * gain_PNT).sum((0, 1)) / variance_T.clamp_min(1e-8)).clamp(-1, 0)
    return gain_PNT - slope_T * before_PNT


@credit.rule(raw=surprises)
def advantages(rewards_PNS: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """Surprises, normalised as stepwise credit normalises gains, `[P, N, T]`."""
    found = surprises(rewards_PNS, trainable_T, options)
    return ops.gain_advantages(
        with_gains(rewards_PNS, found),
        normalize=options.normalize,
        mask=statistics_mask(trainable_T, options),
        clamp=options.clamp,
    )
