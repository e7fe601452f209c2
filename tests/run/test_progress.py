"""Where a run continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfgrpo import config
from sfgrpo.run.checkpoints import CheckpointError
from sfgrpo.trainer import Trainer

pytestmark = pytest.mark.slow

SHORT = {
    "run__iterations": "1",
    "sample__prompts_per_iteration": "1",
    "eval": "{every: 100, prompts: 1, images_per_prompt: 2, num_steps: 1, judges: []}",
}


def values(trainer: Trainer) -> dict[str, Tensor]:
    """What is trained, and its averages."""
    masters = trainer.engine.masters
    found = masters.whole()
    with trainer.progress.averaged():
        return found | {f"{name} averaged": value for name, value in masters.whole().items()}


def test_a_run_goes_on_at_another_stage_and_says_so(
    recipe: Callable[..., config.Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = Trainer(recipe(tmp_path, **SHORT, deepspeed__zero_stage="1"))
    first.train()
    capsys.readouterr()
    again = Trainer(recipe(tmp_path, **SHORT, deepspeed__zero_stage="3"))
    (line,) = [said for said in capsys.readouterr().err.splitlines() if "was written" in said]
    folder = tmp_path / "checkpoints" / "000001"
    assert line == (
        f"sfgrpo: '{folder}' was written at ZeRO stage 1 on 1 rank(s); "
        "the run goes on at stage 3 on 1"
    )
    assert (again.iteration, again.progress.state.zero_stage) == (1, 3)
    before, after = values(first), values(again)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    with pytest.raises(CheckpointError, match=r"000001' cannot be continued: .* this run is at 0"):
        Trainer(recipe(tmp_path, **SHORT))
