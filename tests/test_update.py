"""Ratios where rollout and training do not give the same velocities, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfgrpo import config
from sfgrpo.drift import Disagreement
from sfgrpo.run import records
from sfgrpo.sections import RateDecay, Train
from sfgrpo.trainer import Trainer
from sfgrpo.update import learning_rate
from tests.support import batch_dependent, ranks

Make = Callable[..., config.Recipe]

STILL: dict[str, str] = {
    "run__iterations": "1",
    "train__updates_per_iteration": "2",
    "train__learning_rate": "1e-30",  # no weight changes, so every ratio has to stay where it is
    "train__weight_decay": "0",
    "train__drift_budget": str(8 * batch_dependent.RELATIVE),
    "sample__batch_size": "8",
    "train__micro_batch_size": "3",
    "eval": "{every: 9, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
}  # fmt: skip


def only_row(folder: Path) -> dict[str, Any]:
    (row,) = records.read(folder / "metrics.jsonl")
    return row


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deepspeed__zero_stage": "1", "train__gradient_checkpointing": "true"},
        {"deepspeed__zero_stage": "2", "sample__guidance_scale": "3.0"},
        {"deepspeed__zero_stage": "3", "deepspeed__gather_for_sampling": "layer"},
        {"lora": "null", "train__ratio": "guard"},
        {"model__dtype": "fp16"},
    ],
    ids=["stage 0", "stage 1, checkpointing", "stage 2, guidance", "stage 3", "guard", "fp16"],
)
def test_rounding_moves_no_ratio(
    recipe: Make, tmp_path: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of both updates are compared with the forward that trains them: exactly 1."""
    # PyTorch computes fp16 on any CPU; DeepSpeed asks for a native one.
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    batch_dependent.train(recipe(tmp_path, **STILL, **changes))
    row = only_row(tmp_path)
    assert row["ratio_min"] == row["ratio_max"] == 1
    assert row["clip_fraction"] == 0
    assert row["grad_norm"] > 0
    shares = row["logp_drift_of_budget"]
    assert [share > 0 for share in shares] == [False, True, True, False]
    assert max(shares) < 0.5


@pytest.mark.slow
def test_fp16_with_loss_scaling_learns_what_fp32_does(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both through velocities that depend on the batch's size."""
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    found = {}
    for dtype in ("fp32", "fp16"):
        batch_dependent.train(
            recipe(
                tmp_path / dtype, model__dtype=dtype, train__learning_rate="1e-2",
                train__ema_decay="0", train__beta="0", train__updates_per_iteration="2",
                train__drift_budget=STILL["train__drift_budget"],
                eval="{every: 3, prompts: 4, images_per_prompt: 4, num_steps: 2, judges: []}",
            )
        )  # fmt: skip
        found[dtype] = [row["reward"] for row in records.read(tmp_path / dtype / "eval.jsonl")]
    rows = records.read(tmp_path / "fp16" / "metrics.jsonl")
    assert all(row["loss_scale"] > 1 for row in rows)
    assert all(row["skipped_steps"] == 0 for row in rows)
    before, after = found["fp32"]
    assert abs(found["fp16"][-1] - after) < 0.05 * abs(after - before)


def test_rounding_moves_no_ratio_on_two_ranks(recipe: Make, tmp_path: Path) -> None:
    given = recipe(tmp_path, **STILL, deepspeed__zero_stage="2")
    ranks.run("tests.support.batch_dependent:train", 2, given)
    assert only_row(tmp_path)["ratio_min"] == only_row(tmp_path)["ratio_max"] == 1


def test_the_samplers_densities_are_there_by_option(recipe: Make, tmp_path: Path) -> None:
    """With them rounding moves the ratios, as in published code."""
    given = recipe(tmp_path, **STILL, train__old_logp="sampling", train__clip_range="0.9")
    batch_dependent.train(given)
    row = only_row(tmp_path)
    assert row["ratio_min"] < 1 - 1e-6 < 1 + 1e-6 < row["ratio_max"]


def test_later_rows_are_compared_with_the_policy_before_the_first_update(
    recipe: Make, tmp_path: Path
) -> None:
    """A first update that changes something moves the ratios of the second one's rows only."""
    changes = {**STILL, "train__learning_rate": "1e-2"}
    batch_dependent.train(recipe(tmp_path, **changes))
    row = only_row(tmp_path)
    assert row["ratio_min"] < 0.9
    assert row["clip_fraction"] <= 0.5  # a half of the rows, at ratio 1, cannot be clipped
    assert max(row["logp_drift_of_budget"]) < 0.5  # measured before the weights had changed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dropout_in_training_is_no_rounding(recipe: Make, tmp_path: Path, dtype: str) -> None:
    """A network that drops a few of its activations while gradients are recorded does not give what
    was sampled, though every ratio of the first update would be 1."""
    given = recipe(tmp_path, **{**STILL, "model__dtype": dtype, "train__drift_budget": "null"})
    trainer = Trainer(given)
    trainer.progress.state.evaluated = 0
    before = [p.detach().clone() for p in trainer.engine.trainable.values()]

    def drop(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return F.dropout(output, 0.05) if torch.is_grad_enabled() else output

    trainer.backbone.transformer.get_submodule("norm_out").register_forward_hook(drop)
    with pytest.raises(Disagreement, match="no dropout"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.engine.trainable.values()))


def test_the_guard_ratio_spreads_less_where_noise_is_small(recipe: Make, tmp_path: Path) -> None:
    """Its logarithm is n times the density's, and the first update's gradient is of one size."""
    spread = {}
    for ratio in ("density", "guard"):
        changes = {**STILL, "train__learning_rate": "1e-3", "train__ratio": ratio}
        Trainer(recipe(tmp_path / ratio, **changes)).train()
        row = only_row(tmp_path / ratio)
        spread[ratio] = row["ratio_max"] - row["ratio_min"]
    assert 0 < spread["guard"] < 0.7 * spread["density"]  # eta is .7, so n < .7


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"rate_decay": {"iterations": 5, "shape": "linear"}}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"rate_decay": {"iterations": 5}}, [1, 0.8535534, 0.5, 0.1464466, 0, 0]),
        ({"rate_decay": {"iterations": 3, "end": 0.2}}, [1, 0.6, 0.2, 0.2, 0.2, 0.2]),
        (
            {"warmup": 1, "rate_decay": {"iterations": 4, "shape": "linear", "end": 0.5}},
            [0.5, 1, 0.75, 0.5, 0.5, 0.5],
        ),
        ({"warmup": 2, "rate_decay": {"iterations": 3}}, [1 / 3, 2 / 3, 1, 0, 0, 0]),
    ],
)
def test_the_learning_rate_follows_from_the_iteration(
    keys: dict[str, Any], expected: list[float]
) -> None:
    train = Train(learning_rate=2.0, **keys)
    found = [learning_rate(train, iteration) / 2 for iteration in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_rate_that_falls_before_it_has_risen_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be more than the 5 of warmup, got 5"):
        Train(warmup=5, rate_decay=RateDecay(iterations=5))


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_steps_are_taken_at_that_rate(recipe: Make, tmp_path: Path, stage: str) -> None:
    """At a rate of 0 nothing changes; the optimiser had another one at the start."""
    given = recipe(
        tmp_path, run__iterations="2", train__learning_rate="1e-2", deepspeed__zero_stage=stage,
        train__rate_decay="{iterations: 2}", train__ema_decay="0", eval=STILL["eval"],
    )  # fmt: skip
    Trainer(given).train()
    rates = [row["learning_rate"] for row in records.read(tmp_path / "metrics.jsonl")]
    assert rates == [1e-2, 0]
    before, after = (
        load_file(tmp_path / "checkpoints" / name / "model" / "adapter_model.safetensors")
        for name in ("000001", "000002")
    )
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert any(value.any() for name, value in before.items() if "lora_B" in name)
