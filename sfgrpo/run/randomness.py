"""The generators that code of others may draw from.

Nothing of ours reads them: noise depends on (seed, sample, step, element), prompts and the order
of rows on (seed, iteration). A reward or a judge may; seeded anew for every iteration, it draws the
same numbers in a run that was stopped and continued, and no generator's state needs saving.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def reseed(seed: int, iteration: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators for an iteration, each rank differently."""
    words = np.random.SeedSequence([seed, iteration, rank]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) % 2**63)
