"""The training loop on a random pipeline: it learns, survives crashes, agrees over ranks."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file

from sfgrpo import evaluate, ops, sde
from sfgrpo.backbones import sd3
from sfgrpo.rollout import START, sample
from sfgrpo.run import records
from sfgrpo.run.stopping import Interrupted, Signals
from sfgrpo.trainer import Trainer
from tests.support import training
from tests.support.rewards import Crash, Redness


@pytest.fixture(autouse=True)
def _no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redness, "calls", 0)
    monkeypatch.setattr(Redness, "crash_at", None)


def logs(folder: Path) -> dict[str, str]:
    names = ("metrics", "eval", "eval_prompts")
    return {name: (folder / f"{name}.jsonl").read_text() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_training_raises_the_reward(recipe, tmp_path: Path, weights: str) -> None:
    rate = {"lora": "3e-3", "full": "5e-4"}[weights]
    changes = {"lora": "null"} if weights == "full" else {}
    given = recipe(
        tmp_path, run__iterations="20", train__learning_rate=rate, train__ema_decay="0.5",
        sample__group_size="8", sample__batch_size="64", train__micro_batch_size="64",
        train__beta="1e-6", checkpoint="{every: 100}",
        eval="{every: 20, prompts: 4, images_per_prompt: 4, num_steps: 2}", **changes,
    )  # fmt: skip
    Trainer(given).train()
    rows = records.read(tmp_path / "eval.jsonl")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.008
    metrics = records.read(tmp_path / "metrics.jsonl")
    assert metrics[0]["kl"] == 0  # the first update starts at the reference
    assert metrics[-1]["kl"] > 0
    assert all(row["logp_drift_max"] < 1e-4 for row in metrics)
    assert [len(row["gain_per_step"]) for row in metrics] == [4] * 20


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not disturbed, of 16 calls of the reward."""
    folder, before = tmp_path_factory.mktemp("whole"), Redness.calls
    Trainer(recipe(folder)).train()
    assert Redness.calls >= before + 16
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 9, 16])
def test_a_crash_anywhere_leaves_no_trace(
    recipe, whole: Path, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at reward call `call` and started again, a run writes the bytes of one that was not
    stopped, and ends with its weights."""
    cut = tmp_path / "cut"
    monkeypatch.setattr(Redness, "crash_at", call)
    with pytest.raises(Crash):
        Trainer(recipe(cut)).train()
    with (cut / "metrics.jsonl").open("a") as log:
        log.write('{"iteration": 99, "cut sho')  # what a kill in the middle of a write leaves
    Trainer(recipe(cut)).train()
    assert logs(cut) == logs(whole)
    ema = "checkpoints/000003/ema.safetensors"
    expected = load_file(whole / ema)
    assert all(torch.equal(v, expected[k]) for k, v in load_file(cut / ema).items())
    assert [p.name for p in sorted((cut / "checkpoints").iterdir())] == ["000002", "000003"]
    kept = {path.name: path.read_bytes() for path in (whole / "strips").iterdir()}
    assert {path.name: path.read_bytes() for path in (cut / "strips").iterdir()} == kept
    assert sorted(kept) == [f"00000{k}.{kind}" for k in (1, 2, 3) for kind in ("json", "png")]


class Late(Signals):
    """Asks the run to stop at safe point `left`."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def check(self) -> None:
        self.left -= 1
        if not self.left:
            raise Interrupted(signal.SIGINT)


@pytest.mark.parametrize("left", [3, 24, 39])
def test_sampling_and_evaluation_stop_between_their_steps(
    recipe, whole: Path, tmp_path: Path, left: int
) -> None:
    """What is finished then is saved, and the run goes on as if it had not stopped."""
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        Trainer(recipe(cut, checkpoint="{every: 100}")).train(Late(left))
    finished = [row["iteration"] for row in records.read(cut / "metrics.jsonl")]
    assert (cut / f"checkpoints/{len(finished):06d}/manifest.json").is_file()
    Trainer(recipe(cut)).train()
    assert logs(cut) == logs(whole)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_was_trained_loads_into_the_stock_pipeline(
    recipe, pipeline_folder: Path, tmp_path: Path, weights: str
) -> None:
    """The stock pipeline, given a checkpoint's `model` folder, draws what our evaluation draws."""
    changes = {"lora": "null"} if weights == "full" else {}
    trainer = Trainer(recipe(tmp_path, train__learning_rate="1e-2", **changes))
    trainer.train()
    model = tmp_path / "checkpoints" / "000003" / "model"
    pipe = sd3.load(pipeline_folder).pipeline
    untouched = draw(pipe, trainer)
    if weights == "lora":
        pipe.load_lora_weights(str(model))
    else:
        pipe.transformer = SD3Transformer2DModel.from_pretrained(model / "transformer")
    with trainer.progress.averaged():
        field = trainer.field(trainer.prompts.train[:1])
        plan = evaluate.held_out_plan(1, 1, trainer.device)
        table = sde.coefficients(trainer.backbone.sigmas(4, trainer.latent_shape), "ode")
        ours = sample(
            field, table, plan, seed=0, latent_shape=trainer.latent_shape, methods={}
        ).states.x_U
    stock = draw(pipe, trainer)
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4)
    assert (stock - untouched).abs().max() > 0.05


def draw(pipe: StableDiffusion3Pipeline, trainer: Trainer) -> torch.Tensor:
    """Latents of the first prompt from the first held-out noise, by the stock pipeline."""
    noise: Any = ops.philox_normal(
        trainer.latent_shape, seed=0, sample_ids=torch.tensor([evaluate.HELD_OUT]), step_ids=START
    )
    pipe.set_progress_bar_config(disable=True)
    (latents,) = pipe(
        trainer.prompts.train[0].text, latents=noise, num_inference_steps=4, guidance_scale=0.0,
        max_sequence_length=0, height=32, width=32, output_type="latent", return_dict=False,
    )  # fmt: skip
    return torch.as_tensor(latents)


def test_a_finished_run_can_be_extended_but_not_changed(recipe, tmp_path: Path) -> None:
    Trainer(recipe(tmp_path, run__iterations="1")).train()
    Trainer(recipe(tmp_path, run__iterations="2")).train()
    assert [row["iteration"] for row in records.read(tmp_path / "metrics.jsonl")] == [1, 2]
    with pytest.raises(records.RunError, match=r"sample.eta: 0.7 there, 0.5 here.*--fresh"):
        Trainer(recipe(tmp_path, sample__eta="0.5"))
    Trainer(recipe(tmp_path, sample__eta="0.5", run__iterations="1"), fresh=True).train()
    assert [row["iteration"] for row in records.read(tmp_path / "metrics.jsonl")] == [1]


def test_a_reward_that_is_not_a_number_stops_the_run(recipe, tmp_path: Path) -> None:
    given = recipe(tmp_path, reward="{'tests.support.rewards:NotANumber': 1}")
    with pytest.raises(ValueError, match="NotANumber' is nan for prompt 'a white"):
        Trainer(given).train()


BOTH = {
    "reward": "{'tests.support.rewards:Redness': 1, 'tests.support.rewards:Blueness': 1}",
    "credit__mixture": "gdpo",
}
"""Two rewards whose scales are a hundredfold apart, one of them of final images alone."""


@pytest.mark.parametrize(
    ("rule", "mixed"), [("stepwise", {}), ("uniform", {}), ("stepwise", BOTH)], ids=str
)
def test_a_window_that_moves_survives_a_crash(
    recipe, tmp_path: Path, rule: str, mixed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each iteration trains the steps of its window and scores no state that no gain needs; what is
    started again goes on with the window where it was."""
    changes = {
        **mixed,
        "sample__num_steps": "6", "train__updates_per_iteration": "2", "credit__rule": rule,
        "sample__window": "{steps: 2, schedule: progressive, interval: 1}",
        "eval": "{every: 9, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
    }  # fmt: skip
    Trainer(recipe(tmp_path / "whole", **changes)).train()
    rows = records.read(tmp_path / "whole" / "metrics.jsonl")
    for iteration, row in enumerate(rows):
        inside = [rule == "stepwise" and iteration < k < iteration + 3 for k in range(6)]
        assert [gain > 0 for gain in row["gain_per_step"]] == inside
    monkeypatch.setattr(Redness, "crash_at", Redness.calls + 3)
    with pytest.raises(Crash):
        Trainer(recipe(tmp_path / "cut", **changes)).train()
    Trainer(recipe(tmp_path / "cut", **changes)).train()
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "mixed"),
    [
        ("{steps: 2, schedule: random}", {}),  # without a window: tests/engine/test_zero.py
        ("null", {**BOTH, "run__iterations": "2"}),
    ],
    ids=str,
)
def test_two_ranks_do_what_one_does(
    recipe, tmp_path: Path, window: str, mixed: dict[str, str]
) -> None:
    """Groups of three over two ranks split a group; ZeRO 2 shards what is sharded."""
    changes = {
        **mixed,
        "sample__window": window,
        "sample__prompts_per_iteration": "2",
        "sample__group_size": "3",
        "train__updates_per_iteration": "2",
    }
    alone, both = tmp_path / "alone", tmp_path / "both"
    Trainer(recipe(alone, **changes)).train()
    training.on_ranks(recipe(both, **changes, deepspeed__zero_stage="2"), 2)
    for log in ("metrics.jsonl", "eval.jsonl"):
        pairs = zip(records.read(alone / log), records.read(both / log), strict=True)
        for one, two in pairs:
            for name in one.keys() - {"loss", "ratio_min", "ratio_max"}:
                if "drift" not in name:
                    assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), name


@pytest.mark.slow
def test_a_killed_process_resumes(recipe, whole: Path, tmp_path: Path) -> None:
    """kill -9 from outside, as soon as the first checkpoint stands; then the same run again."""
    cut = tmp_path / "cut"
    run = training.command_line(recipe(cut), tmp_path, sys.executable, "-u", "-m")
    while not list(cut.glob("checkpoints/0*")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    run.kill()
    run.wait()
    Trainer(recipe(cut)).train()
    found, expected = records.read(cut / "metrics.jsonl"), records.read(whole / "metrics.jsonl")
    assert [row["iteration"] for row in found] == [1, 2, 3]
    for one, two in zip(expected, found, strict=True):
        assert one == two
