"""The engine on one rank, in this process."""

from __future__ import annotations

import warnings

import deepspeed
import torch

from sfgrpo import engine


def test_what_deepspeed_calls_at_stage_3_does_not_warn_each_time() -> None:
    """PyTorch 2.13 has other names for the two: thousands of lines in the log of a short run."""
    whole, share = torch.zeros(4), torch.ones(4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.start()
        deepspeed.comm.all_gather_into_tensor(whole, share)
        deepspeed.comm.reduce_scatter_tensor(whole, share)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]
