"""A velocity network of one's own: a robot's policy trained through the same loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfgrpo import backbones, engine, rewards
from sfgrpo.backbones import ModuleBackbone
from sfgrpo.run import alarms, records
from sfgrpo.trainer import Trainer
from tests.support.reaching import ACTIONS, JOINTS, recipe


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_policy_learns_to_reach(tmp_path: Path, weights: str) -> None:
    lora = "null" if weights == "full" else "{rank: 8, alpha: 16}"
    Trainer(recipe(tmp_path, lora=lora)).train()
    first, last = records.read(tmp_path / "run" / "eval.jsonl")
    assert last["reward"] > first["reward"] + 0.1
    assert last["spread"] > 0
    assert "alarms" not in first
    metrics = records.read(tmp_path / "run" / "metrics.jsonl")
    assert last["alarms"] == alarms.estimates(metrics) != {}
    kept = load_file(tmp_path / "run" / "samples" / "000015.safetensors")["samples"]
    assert kept.shape == (3, 32, ACTIONS, JOINTS)
    assert not (tmp_path / "run" / "images").exists()
    saved = load_file(tmp_path / "run" / "checkpoints" / "000015" / "model" / "network.safetensors")
    assert all(("lora" in name) == (weights == "lora") for name in saved)


def test_its_report_has_curves_and_no_pictures(tmp_path: Path) -> None:
    from sfgrpo import report

    given = recipe(tmp_path, run__iterations="1", eval__every="1", lora="null")
    Trainer(given).train()
    text = report.write(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "report.html" in text
    assert "<h2>Images</h2>" not in page
    assert "<h2>Reward and credit</h2>" in page


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for name, message in (
        ("nothing_here:load", "cannot be imported: No module named 'nothing_here'"),
        ("tests.support.reaching:lod", "unknown function 'lod'; did you mean 'load'"),
    ):
        with pytest.raises(ValueError, match=message):
            backbones.load(name, "path")
    with pytest.raises(ValueError, match="returned a Policy, which has no method 'latent_shape'"):
        backbones.load("tests.support.reaching:bare", "", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="unknown backbone 'flix'; did you mean 'flux'"):
        recipe(tmp_path, model__backbone="flix")
    wanted = "train.gradient_checkpointing: Policy has no method"
    with pytest.raises(ValueError, match=wanted):
        Trainer(recipe(tmp_path, train__gradient_checkpointing="true", lora="null"))
    with pytest.raises(ValueError, match=r"eval.resolution .* are \(4, 2\) whatever the size"):
        Trainer(recipe(tmp_path, eval__resolution="64", lora="null"))
    with pytest.raises(ValueError, match=r"lora.targets: .*no_such_layer"):
        Trainer(recipe(tmp_path, lora="{rank: 2, alpha: 2, targets: [no_such_layer]}"))


OWN = """
from pathlib import Path
import torch
from sfgrpo import credit
from tests.support import reaching as there

def note(**options):
    with Path("seen.txt").open("a") as file:
        file.writelines(f"{name} {value}\\n" for name, value in options.items())

def policy(path, *, device, dtype, width):
    note(width=width)
    return there.load(path, device=device, dtype=dtype)

class Reaches(there.Reaches):
    def __init__(self, gain=1):
        note(gain=gain)

def half(step, share=0.5):
    note(share=share)
    return 1.0, step.s - step.t, share * step.s

@credit.rule(estimates=False)
def last(rewards, trainable, options, *, power=1):
    note(power=power)
    return rewards[..., -1:].expand(*rewards.shape[:2], len(trainable)) ** power

def spread(samples, metadata, *, ddof):
    note(ddof=ddof)
    return there.spread(samples, metadata)
"""


@pytest.mark.slow
def test_all_that_a_recipe_names_may_be_ones_own(tmp_path: Path) -> None:
    """The installed command, in a folder with a recipe and one file: a backbone, a reward, a
    sampler, a credit rule and a judge, each with an option."""
    (tmp_path / "mine.py").write_text(OWN)
    given = recipe(
        tmp_path, run__iterations="1", lora="null", train__updates_per_iteration="1",
        model="{backbone: 'mine:policy', path: none, options: {width: 64}}",
        reward="{'mine:Reaches': 1}", reward_options="{'mine:Reaches': {gain: 2}}",
        sample__sampler="mine:half", sample__sampler_options="{share: 0.25}",
        credit="{rule: 'mine:last', options: {power: 3}}",
        eval__judges="['mine:spread']", eval__judge_options="{'mine:spread': {ddof: 0}}",
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(given.model_dump(mode="json")))
    command = Path(sys.executable).parent / "sfgrpo"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [command, "train", path.name], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen = set((tmp_path / "seen.txt").read_text().splitlines())
    assert seen == {"width 64", "gain 2", "share 0.25", "power 3", "ddof 0"}
    assert "spread" in records.read(tmp_path / "run" / "eval.jsonl")[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample__sampler": "sfgrpo.samplers:dimm"}, "unknown function 'dimm'; did you mean 'ddi"),
        ({"sample__sampler_options": "{a: 1}"}, "sampler 'ddim' has no options, got 'a'"),
        ({"credit__options": "{a: 1}"}, "credit rule 'stepwise' has no options, got 'a'"),
        (
            {"eval__judges": "['tests.support.reaching:Policy']"},
            r"judge '.*:Policy' is called with \(samples, metadata\), and takes \(\)",
        ),
        (
            {"model": "{backbone: 'tests.support.reaching:spread', path: none}"},
            r"is called with \(path, dtype=, device=\), and takes no 'dtype'",
        ),
        (
            {"reward": "{'tests.support.reaching:spread': 1}"},
            r"missing a required argument: 'samples'; see reward_options \(it is called with these "
            r"alone, and what it returns with \(images, prompts, metadata\)\)",
        ),
        (
            {"reward": "{'builtins:object': 1}"},
            r"returned a object, which cannot be called with \(images, prompts, metadata\)",
        ),
        ({"eval__judges": "['no:judge']"}, "judge 'no:judge' cannot be imported: No module nam"),
    ],
)
def test_wrong_names_and_options_end_the_run_before_it_starts(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = recipe(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Trainer(given)


def test_what_a_module_raises_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, message in (
        (
            "broken_a",
            "x = (1\n",
            r"reward 'broken_a:f' cannot be imported: .*broken_a.py, line 1: ",
        ),
        ("broken_b", "x = 1\n1 / 0\n", r"broken_b.py, line 2: ZeroDivisionError: division by zero"),
        ("broken_c", "import not_there\n", r"broken_c.py, line 1: No module named 'not_there'"),
        ("broken_d", "raise SystemExit(0)\n", r"broken_d.py, line 1: SystemExit: 0"),
        ("broken_e", "f = 3\n", r"reward 'broken_e:f' is a int, not a function"),
        ("broken_f", "import json\njson.loads('[')\n", r"broken_f.py, line 2: JSONDecodeError: "),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            rewards.build(f"{name}:f")


class Tied(nn.Module):
    """Two names for one weight, and two for one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        mean = torch.ones(4)
        self.register_buffer("mean", mean)
        self.register_buffer("start", mean)


class Remembers(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_tied_weights_are_saved_and_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:

    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    network = Tied()
    ModuleBackbone(network, shape=(4,), encode=encode).save(tmp_path)
    loaded = Tied()
    loaded.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match="state holds '_extra_state', a dict"):
        ModuleBackbone(Remembers(4, 4), shape=(4,), encode=encode)


def test_brackets_in_the_folder_name_no_other_run(tmp_path: Path) -> None:
    """DeepSpeed takes a checkpoint's path for a pattern, and `s[1]` matches `s1`."""
    keys = {"run__iterations": "1", "lora": "null", "eval__judges": "[]", "train__beta": "0"}
    for name, seed in (("s1", "1"), ("s[1]", "2")):
        Trainer(
            recipe(tmp_path, **keys, run__seed=seed, run__output_dir=str(tmp_path / name))
        ).train()
    again = Trainer(recipe(tmp_path, **keys, run__seed="2", run__output_dir=str(tmp_path / "s[1]")))
    saved = tmp_path / "s[1]" / "checkpoints" / "000001" / "engine" / "mp_rank_00_model_states.pt"
    expected = torch.load(saved, weights_only=False)["module"]
    assert again.iteration == 1
    for name, value in again.policy.network.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_process_trains_again_after_it_left_its_group(tmp_path: Path) -> None:
    """As a notebook does that calls the command twice."""
    keys = {"run__iterations": "1", "lora": "null", "eval__judges": "[]", "train__beta": "0"}
    for name in ("first", "second"):
        Trainer(recipe(tmp_path, **keys, run__output_dir=str(tmp_path / name))).train()
        engine.stop()
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second")]
    assert logs[0] == logs[1]
