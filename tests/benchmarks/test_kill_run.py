"""What the kill test calls equal."""

from __future__ import annotations

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler, LossScalerBase

from benchmarks.trainer import kill_run


def test_objects_of_deepspeed_are_compared_by_value() -> None:
    """A checkpoint from stage 1 on holds its loss scaler, which knows no equality."""

    def saved(scale: int, value: float = 1.0) -> dict[str, object]:
        return {
            "loss_scaler": LossScaler(scale),
            "state": [torch.full((2,), value), (1, "a"), None],
        }

    assert kill_run.equal(saved(4), saved(4))
    assert not kill_run.equal(saved(4), saved(2))
    assert not kill_run.equal(saved(4), saved(4, 2.0))
    assert not kill_run.equal(LossScaler(4), LossScalerBase(4))
