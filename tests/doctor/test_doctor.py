"""`sfgrpo doctor`: what it says of a machine, and its estimates beside what a run really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.trainer import held
from sfgrpo import backbones, cli, config, offload, zero
from sfgrpo.doctor import footprint, host, machine, memory, selfcheck
from sfgrpo.doctor.examination import Report, _judge
from sfgrpo.doctor.memory import Network, Setting, Work
from sfgrpo.doctor.variants import RELIEF, Room
from sfgrpo.ops._library import REFERENCES
from sfgrpo.policy import Policy
from sfgrpo.trainer import Trainer
from tests.support import families
from tests.support.families import FAMILIES

TINY = {
    "run.iterations": "1",
    "reward": "{'tests.support.rewards:Redness': 1}",
    "sample": "{prompts_per_iteration: 2, group_size: 3, num_steps: 4, batch_size: 8}",
    "credit.solver": "euler",
    "credit.solver_options": "{substeps: 2}",
    "train.updates_per_iteration": "1",
    "train.micro_batch_size": "6",
    "eval": "{every: 1, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
    "checkpoint": "{every: 1, keep: 1}",
}


@pytest.fixture
def recipe(pipeline_folder: Path, prompt_file: Path, tmp_path: Path):
    def make(**changes: str) -> config.Recipe:
        keys = {
            **TINY, "model.path": str(pipeline_folder), "prompts": str(prompt_file),
            "run.output_dir": str(tmp_path / "run"),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }  # fmt: skip
        return config.load("embedded", list(keys.items()))

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), held.CASES)
def test_states_are_estimated_to_the_byte(stage: int, dtype: memory.Dtype) -> None:
    """Through the project's engine on one rank. Adam's step counters are what is left out."""
    measured, estimated = held.compare(stage, dtype)
    assert 0 <= measured - estimated <= 64


N = 2**19
TWO_RANKS = [
    ({"stage": 0}, 16.0),
    ({"stage": 1}, 15.0),
    ({"stage": 1, "dtype": "bf16"}, 14.0),
    ({"stage": 1, "offload_optimizer": True}, 19.25),
    ({"stage": 1, "dtype": "bf16", "offload_optimizer": True}, 16.13),
    ({"stage": 2}, 12.0),
    ({"stage": 2, "dtype": "bf16"}, 10.0),
    ({"stage": 2, "offload_optimizer": True}, 16.25),
    ({"stage": 2, "dtype": "bf16", "offload_optimizer": True}, 13.13),
    ({"stage": 3}, 11.0),
    ({"stage": 3, "dtype": "bf16"}, 9.5),
    ({"stage": 3, "dtype": "bf16", "offload_optimizer": True}, 11.5),
]
"""Bytes per element held by each of two ranks of DeepSpeed 0.19.8, measured on 32 layers of
128 x 128 with buckets of a quarter of the network, accumulating in fp32."""


@pytest.mark.parametrize(("given", "measured"), TWO_RANKS)
def test_states_of_two_ranks(given: dict, measured: float) -> None:
    network = Network(elements=N, trained=N, largest=N // 32)
    state = memory.held(network, Setting(world=2, bucket=N // 4, **given))
    assert (state.device + state.host) / N == pytest.approx(measured, abs=0.01)


def cpu_peak(run) -> int:
    """Peak of PyTorch's CPU allocations during `run()`, above the start: the profiler's count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    recorded: Any = profiler.profiler
    for event in sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_activations_of_an_update(recipe, weights: str) -> None:
    """The profiler sees what the trainer's update allocates; the estimate knew without weights."""
    lora = "null" if weights == "full" else "{rank: 4, alpha: 8}"
    # Untrained weights beside made-up rows: training and rollout need not agree.
    given = recipe(
        model__path="embedded", lora=lora, sample__guidance_scale="2.0", train__drift_budget="1e9"
    )  # of four layers: the half of them would save little
    network, (plain, checkpointed) = footprint.measure(given, world=1)
    trainer = Trainer(given)
    assert network == footprint.counts(trainer.policy.network)
    chosen = trainer.draw()
    plan, field = trainer.layout.plan(0), trainer.field(chosen)
    schedule = trainer.layout.schedule(0)
    made = trainer.sample(field, schedule, plan)
    rows = trainer.rows(made, torch.ones(2, 3, 4), schedule, plan)
    trainer.update(field, rows, iteration=0)
    setting = Setting(foreach=False, bucket=network.trained)
    state = memory.held(network, setting)
    found = memory.phases(network, setting, Work(backward=plain.backward))
    between = state.device - state.gradients
    measured = cpu_peak(lambda: trainer.update(field, rows, iteration=0))
    assert measured == pytest.approx(found["backward"] - between, rel=0.1)
    assert checkpointed.backward < 0.6 * plain.backward


@pytest.mark.slow
def test_checkpointing_measured_on_real_tensors(recipe) -> None:
    """The same micro-batch with weights: fake tensors predict its peak to the byte."""
    given = recipe()
    _, (plain, checkpointed) = footprint.measure(given, world=1)
    trainer = Trainer(given)
    size, real = given.train.micro_batch_size, []
    for _ in range(2):
        with footprint.Ledger() as ledger:
            ledger.add_all(trainer.policy.network)
            backbone: Any = trainer.backbone
            real.append(footprint._backward(given, backbone, ledger, size)[0])
        trainer.policy.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    assert real == [plain.backward, checkpointed.backward]


def test_twelve_billion_parameters_cost_nothing(pipeline_folder: Path, tmp_path: Path) -> None:
    """A transformer that fits into no machine of ours is counted from its configuration."""
    folder = tmp_path / "large"
    for part in pipeline_folder.rglob("*"):
        if part.suffix == ".json":
            (folder / part.relative_to(pipeline_folder)).parent.mkdir(parents=True, exist_ok=True)
            (folder / part.relative_to(pipeline_folder)).write_bytes(part.read_bytes())
    path = folder / "transformer" / "config.json"
    wide = {"num_attention_heads": 48, "attention_head_dim": 128, "caption_projection_dim": 6144}
    path.write_text(json.dumps({**json.loads(path.read_text()), **wide, "num_layers": 9}))
    given = config.load(
        "embedded",
        [("model.path", str(folder)), ("model.dtype", "bf16"), ("lora", "{rank: 8, alpha: 8}")],
    )
    backbone = footprint.skeleton(given)
    network = footprint.counts(backbone.transformer)
    assert 11e9 < network.elements < 13e9
    assert network.trained < 0.01 * network.elements
    states = [memory.held(network, Setting(stage=s, world=8, dtype="bf16")).device for s in (1, 3)]
    assert states[0] > 2 * network.elements
    assert states[1] < 0.3 * states[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_other_families_are_held_as_estimated(name: str, tmp_path: Path) -> None:
    """Bytes of a folder's real weights, loaded and given adapters as a run does, in bf16, where
    Wan's norms stay in fp32."""
    family, folder = FAMILIES[name], families.save(name, tmp_path / "pipeline")
    keys = {
        **TINY, "model.backbone": family.backbone, "model.path": str(folder), "model.dtype": "bf16",
        "model.resolution": "32", "model.num_frames": str(family.size[2]),
        "model.max_sequence_length": str(family.length), "lora": "{rank: 4, alpha: 8}",
        "sample.embedded_guidance": json.dumps(family.embedded_guidance),
        "sample.guidance_scale": "2.0",
    }  # fmt: skip
    given = config.load("embedded", list(keys.items()))
    network, (plain, checkpointed) = footprint.measure(given, world=1)
    backbone: Any = backbones.load(
        family.backbone, folder, dtype=torch.bfloat16, embedded_guidance=family.embedded_guidance,
        max_sequence_length=family.length,
    )  # fmt: skip
    policy = Policy(backbone.transformer, given, backbone.lora_targets)
    assert network == footprint.counts(policy.network)
    weights = memory.held(network, Setting(dtype="bf16", stage=1)).weights
    assert 0 <= weights - footprint.bytes_of(policy.network) <= 4
    parts = [part for part in backbone.pipeline.components.values() if isinstance(part, nn.Module)]
    assert plain.others + footprint.bytes_of(policy.network) == sum(map(footprint.bytes_of, parts))
    assert min(plain.sampling, plain.decoding, plain.embedding, checkpointed.backward) > 0
    assert plain.backward > checkpointed.backward


@pytest.mark.slow
def test_where_text_encoders_are_when_they_do_not_embed(recipe, tmp_path: Path) -> None:
    changes = ({}, {"model__text_encoders": "offload"}, {"model__prompt_cache": str(tmp_path)})
    (network, (stay,)), (_, (offload,)), (_, (alone,)) = (
        footprint.measure(recipe(**keys), world=1, checkpointing=(False,)) for keys in changes
    )
    assert stay.encoders == offload.encoders == alone.encoders > 0
    assert stay.others - stay.encoders == offload.others == alone.others
    here, there, before = (
        memory.phases(network, Setting(), work) for work in (stay, offload, alone)
    )
    assert here["embedding"] == there["embedding"]
    assert here["sampling"] - there["sampling"] == stay.encoders
    # Sixteen prompts at once fill a cache, two are drawn in an iteration.
    assert stay.embedding < alone.embedding - alone.encoders
    assert before["embedding"] == alone.embedding


@pytest.mark.slow
def test_evaluation_at_another_size_costs_its_own(recipe) -> None:
    (_, (plain,)), (_, (large,)), (_, (small,)) = (
        footprint.measure(
            recipe(model__resolution="16", sample__batch_size="4", eval__resolution=at),
            world=1, checkpointing=(False,),
        )
        for at in ("null", "32", "[16, 16]")
    )  # fmt: skip
    assert plain == small
    assert (plain.rollout, plain.backward) == (large.rollout, large.backward)
    assert large.sampling > 1.4 * plain.sampling  # four times the image's tokens, as much text
    assert large.decoding == pytest.approx(4 * plain.decoding, rel=0.01)


@pytest.mark.slow
def test_activations_that_wait_are_those_of_a_run(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    checkpointed = {"model__path": "embedded", "train__gradient_checkpointing": "true"}
    given = recipe(**checkpointed, train__offload_activations="cpu")
    (_, (stay,)), (_, (wait,)) = (
        footprint.measure(keys, world=1, checkpointing=(True,))
        for keys in (recipe(**checkpointed), given)
    )
    assert stay.offloaded == 0
    assert stay.backward > wait.backward >= stay.backward - wait.offloaded
    trainer, kept, waits = Trainer(given), [], offload.waits
    field, size = trainer.field(trainer.draw()[:1]), given.train.micro_batch_size
    x, prompt = torch.randn(size, *trainer.latent_shape), torch.zeros(size, dtype=torch.int64)
    monkeypatch.setattr(offload, "waits", lambda t: waits(t) and not kept.append(t.nbytes))
    with offload.activations("cpu"):
        field(x, torch.full((size,), 0.5), prompt)
    assert wait.offloaded == sum(kept) > 4 * x.nbytes  # of four blocks
    network = Network(elements=N, trained=N, largest=N)
    here, there = (host.phases(network, Setting(), work, 2) for work in (stay, wait))
    assert there["training"] - here["training"] == 2 * wait.offloaded


def test_stage_3_loads_its_share_and_gathers_as_asked() -> None:
    network = Network(elements=8 * N, trained=N, largest=N, widest=2 * N)
    layers = Setting(stage=3, world=8, dtype="bf16")
    once = memory.phases(network, replace(layers, gathers=True), Work(sampling=1, decoding=1))
    apart = memory.phases(network, layers, Work(sampling=1, decoding=1))
    in_transit = 2 * network.widest
    assert apart["loading"] == 2 * network.elements // 8 + in_transit
    assert once["decoding"] - apart["decoding"] == 2 * network.elements
    gathered = zero.live(network.elements)  # what the engine tells DeepSpeed to keep
    assert once["sampling"] - apart["sampling"] == 2 * (network.elements - gathered)
    kept = memory.phases(network, replace(layers, reference=True), Work())
    assert kept["loading"] == 2 * (2 * network.elements // 8) + in_transit
    beside = memory.phases(network, Setting(stage=2, world=8, dtype="bf16", reference=True), Work())
    assert beside["loading"] == 2 * 2 * network.elements


def test_a_backbone_of_ones_own_is_not_estimated(
    recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            recipe(model__backbone="tests.support.toy:PointBackbone").model_dump(mode="json")
        )
    )
    assert cli.main(["doctor", str(path)]) == 0
    text = capsys.readouterr().out
    assert "'tests.support.toy:PointBackbone' is not estimated" in text
    assert "Nothing prevents training" in text


def test_every_op_is_checked_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = selfcheck.check(torch.device("cpu"))
    assert {item.op for item in checked} == set(REFERENCES)
    assert all(item.good and item.error is not None for item in checked)
    assert {item.backend for item in checked} == {"C++"}
    right = REFERENCES["tweedie"]
    monkeypatch.setitem(REFERENCES, "tweedie", lambda *args: right(*args) * 1.001)
    wrong = [item.op for item in selfcheck.check(torch.device("cpu")) if not item.good]
    assert wrong == ["tweedie"]


@pytest.mark.slow
def test_the_command(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe().model_dump(mode="json")))
    assert cli.main(["doctor", str(path), "--world", "2", "--train.micro_batch_size", "4"]) == 0
    text = capsys.readouterr().out
    for part in (
        "deepspeed",
        "C++        12 ops",
        "> ZeRO 0",
        "ZeRO 3",
        "of a node",
        "Nothing prevents",
    ):
        assert part in text
    assert "times the cost of uniform credit" in text
    assert "\x1b" not in text
    assert "hf_a_secret" not in text
    assert cli.main(["doctor", str(path), "--json", "--model.dtype", "bf16"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["healthy"]
    assert [row["setting"]["stage"] for row in tree["memory"]] == [1, 2, 3, 1, 2, 3, 3, 3]
    assert [row["chosen"] for row in tree["memory"]].index(True) == 0
    cost, in_rows = tree["cost"], tree["cost"]["in_rows"]
    assert cost["recipe"].keys() == {"velocity", "gradient", "decoded", "scored"}
    assert cost["ratio"] == pytest.approx(in_rows["recipe"] / in_rows["uniform"], 1e-3)
    monkeypatch.setattr(machine, "memory", lambda: 2**20)
    assert cli.main(["doctor", str(path), "--world", "4"]) == 1
    text = capsys.readouterr().out
    assert "6 trajectories (prompts_per_iteration x group_size) do not divide over 4 ranks" in text
    assert cli.main(["doctor", str(path)]) == 1
    assert "more than there is" in capsys.readouterr().out
    assert cli.main(["doctor", str(path), "--model.path", str(tmp_path / "none")]) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_what_helps_is_what_the_fullest_phase_takes_less_by() -> None:
    network = Network(elements=N, trained=N, largest=N)
    assert RELIEF.keys() == memory.phases(network, Setting(), Work()).keys()
    for work, said in ((Work(decoding=2**50), "decode_batch"), (Work(backward=2**50), "micro")):
        report = Report()
        _judge(report, network, work, Setting(), Room(device=2**30))
        assert said in report.problems[0].remedy
