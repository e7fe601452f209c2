"""How several rewards become one advantage of each step.

    sum       the rule of the weighted sum of the rewards        (Flow-GRPO)
    gdpo      the weighted sum of the rule of each reward, normalised over the batch
    dr_grpo   the weighted sum of what the rule normalises, without its mean alone
    ranks     the weighted sum of the ranks of what the rule normalises

What a rule normalises is a gain for each step (`stepwise`) or the final reward (`uniform`); under
"gdpo" and "ranks" a reward counts as its weight says, whatever its scale.

A mixture is one function

    rewards, trainable [T], options -> advantages [P, N, T]

of the `Rewards` of groups whose scores are all finite. To add one, write a module of this package
that calls it `advantages`, or a file of your own, which a recipe names "module:function". `options`
are the recipe's section `credit`; what the function takes beside them are options of its own
(`credit.mixture_options`). Its groups are whole and those of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfgrpo.config import Credit
from sfgrpo.credit import by_rule, get, scored_states, statistics_mask
from sfgrpo.credit.components import Rewards

__all__ = ["Rewards", "by_rule", "centred", "counted", "limited", "of_each", "raw"]


def of_each(rewards: Rewards, trainable_T: Tensor, options: Credit) -> dict[str, Tensor]:
    """What the rule makes of each reward, without a limit, `[P, N, T]` by name; of one that saw
    final images alone, uniform credit."""
    free = options.model_copy(update={"clamp": None})
    uniform = free.model_copy(update={"rule": "uniform", "options": {}})
    apart = _apart(rewards, options)
    return {
        name: by_rule(scores, trainable_T, uniform if name in apart else free)
        for name, scores in rewards.scores.items()
    }


def raw(rewards: Rewards, trainable_T: Tensor, options: Credit) -> dict[str, Tensor]:
    """What the rule normalises of each reward, float64 `[P, N, T]` by name; of one that saw final
    images alone, the same gain in every step."""
    found, apart = {}, _apart(rewards, options)
    for name, scores in rewards.scores.items():
        if name in apart:  # not from its growing rewards, whose gains are equal but for rounding
            blocks = len(scored_states(trainable_T, options).unique()) - 1
            even_PN1 = scores[..., -1:].double() / blocks
            found[name] = even_PN1.expand(*scores.shape[:2], len(trainable_T))
        else:
            found[name] = get(options).raw(scores, trainable_T, options).double()
    return found


def _apart(rewards: Rewards, options: Credit) -> frozenset[str]:
    """The rewards that the rule would read otherwise than the others."""
    return rewards.final_only if get(options).estimates else frozenset()


def counted(trainable_T: Tensor, options: Credit) -> Tensor:
    """bool `[T]`: the steps that enter the statistics."""
    mask_T = statistics_mask(trainable_T, options)
    return torch.ones_like(trainable_T) if mask_T is None else mask_T


def centred(values_PNT: Tensor, trainable_T: Tensor, options: Credit) -> Tensor:
    """The values without their mean: over the group ("joint"), or over each step of the group."""
    if options.normalize == "joint":
        return values_PNT - values_PNT[..., counted(trainable_T, options)].mean((1, 2), True)
    return values_PNT - values_PNT.mean(1, keepdim=True)


def limited(advantages_PNT: Tensor, options: Credit) -> Tensor:
    """float32, within `options.clamp`."""
    if options.clamp is not None:
        advantages_PNT = advantages_PNT.clamp(-options.clamp, options.clamp)
    return advantages_PNT.float()
