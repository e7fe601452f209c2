"""Ranks that share every sequence come to what one comes to; what cannot be shared is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainer import family_checks
from benchmarks.trainer.parity import distance
from sfgrpo import backbones, config, generator
from sfgrpo.backbones import _attention, _context
from sfgrpo.backbones._sizes import Sizes
from sfgrpo.config import RecipeError
from sfgrpo.doctor import footprint
from sfgrpo.trainer import Trainer
from tests.support import context, families, ranks
from tests.support.families import FAMILIES

RATE = 1e-4
SMALL = {
    "train__learning_rate": str(RATE), "sample__group_size": "2", "model__decode_batch": "1",
    "eval": "{every: 9, prompts: 1, images_per_prompt: 2, num_steps: 2, judges: []}",
}  # fmt: skip
RUNS: dict[str, dict[str, str]] = {
    "flux": {"lora": "{rank: 4, alpha: 8, targets: [attn.to_q, ff.net.2, proj_out]}"},
    "qwenimage": {
        "lora": "{rank: 4, alpha: 8, targets: [attn.to_q, attn.add_k_proj, proj_out]}",
        "model__max_sequence_length": "255", "sample__guidance_scale": "1",
    },
    "wan22-ti2v": {
        "lora": "null", "deepspeed": "{zero_stage: 3}", "train__gradient_checkpointing": "true",
    },
}  # fmt: skip
"""Adapters, also on the layer whose output is gathered, and text among the tokens; the same with
text of odd lengths, which is padded and masked; all weights, sharded, with a frozen copy, and a
time for each token."""
PLAIN = {"deepspeed": "{zero_stage: 0}", "train__gradient_checkpointing": "false"}


def recipe(name: str, place: Path, run: str, **changes: str) -> config.Recipe:
    return family_checks.recipe(name, place / name, place / f"{name}-{run}", **SMALL, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines of `RUNS`."""
    folder = tmp_path_factory.mktemp("context")
    for name in RUNS:
        families.save(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def shared(place: Path) -> list[dict[str, Any]]:
    """What two ranks come to."""
    recipes = {
        name: recipe(name, place, "shared", model__context_parallel="2", **options)
        for name, options in RUNS.items()
    }
    return ranks.run("tests.support.context:work", 2, recipes)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_come_to_what_one_comes_to(
    place: Path, shared: list[dict[str, Any]], name: str
) -> None:
    alone = context.run(recipe(name, place, "alone", **{**RUNS[name], **PLAIN}))
    found, other = (rank[name] for rank in shared)
    # Adam takes a whole step also where a gradient is rounding alone, as of one element of Wan's.
    assert distance(found["parameters"], alone["parameters"]) < 0.02 * RATE
    for key in ("reward", "loss", "kl", "grad_norm", "ratio_min", "ratio_max"):
        expected = pytest.approx(alone["metrics"][key], rel=1e-3, abs=1e-6)
        assert found["metrics"][key] == expected, key
    assert found["metrics"]["cost"] == alone["metrics"]["cost"]
    assert found["evaluated"]["reward"] == pytest.approx(alone["evaluated"]["reward"], rel=1e-5)
    assert alone["metrics"]["kl"] > 0
    assert other["metrics"] == found["metrics"]
    assert found["asked"] + other["asked"] == alone["asked"]  # each sample is scored by one of them
    assert abs(found["asked"] - other["asked"]) <= 1
    assert found["peak"] <= 0.6 * alone["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_the_doctor_foretells_what_a_rank_of_them_holds(
    place: Path, shared: list[dict[str, Any]], name: str
) -> None:
    given = recipe(name, place, "shared", model__context_parallel="2", **RUNS[name])
    _, (work,) = footprint.measure(given, world=2, checkpointing=(False,))
    assert work.backward == pytest.approx(shared[0][name]["peak"], rel=0.03)


@pytest.mark.slow
def test_rows_of_several_ranks_are_gathered_once(shared: list[dict[str, Any]]) -> None:
    assert [rank["rows"] for rank in shared] == [[0.0, 1.0]] * 2  # the first rank's


REFUSED = {
    "sd3": "diffusers has no plan of how its network is divided",
    "qwenimage_edit": "its images are tokens, too",
    "ltx": "cross-attention",
    "flux_kontext": "its images are tokens, too",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_are_refused_by_name(name: str) -> None:
    given = config.load("embedded", [("model.backbone", name), ("model.context_parallel", "2")])
    with pytest.raises(
        ValueError, match=f"sequences of backbone '{name}'.*{REFUSED[name]}"
    ) as told:
        generator.check_context(given, 2)
    assert "use 1, or one of flux, flux2, qwenimage, wan, wan_i2v" in str(told.value)


def test_families_are_said_to_have_no_plan_that_have_none() -> None:
    """A family whose network diffusers has a plan for has to give another reason, or to serve."""
    every = {name: backbones.family(name) for name in backbones.available()}
    without = {n: f for n, f in every.items() if f and f.whole_sequences == Sizes.whole_sequences}
    assert {"sd3", "zimage", "hunyuanvideo"} <= without.keys() < every.keys()
    for name, family in without.items():
        for made in family.pipeline_classes:
            network = (
                inspect.signature(made.__init__, eval_str=True).parameters["transformer"].annotation
            )
            assert network._cp_plan is None, name


def test_numbers_that_do_not_divide_are_refused() -> None:
    given = config.load("wan21_14b", [("model.context_parallel", "2")])
    generator.check_context(given, 4)
    with pytest.raises(ValueError, match=r"3 rank\(s\) do not divide into groups of 2; start"):
        generator.check_context(given, 3)
    with pytest.raises(ValueError, match=r"context_parallel: 1 rank\(s\) do not divide"):
        Trainer(given)  # whose model, prompts and rewards are nowhere
    backbone: Any = backbones.load(
        "flux", "none", pipeline=FAMILIES["flux"].build(), embedded_guidance=3.5,
        max_sequence_length=25,
    )  # fmt: skip
    shapes = [backbone.latent_shape(32, 32), backbone.latent_shape(32, 16)]
    _context.check(backbone, 1, shapes)
    with pytest.raises(ValueError, match=r"2 ranks cannot share 25 text tokens .* divide by 1$"):
        _context.check(backbone, 2, shapes)
    with pytest.raises(ValueError, match="3 ranks cannot share 2 attention heads evenly"):
        _context.check(backbone, 3, shapes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.backbone": "tests.support.toy:load"}, "of a network of your own it is not known"),
        ({"model.backbone": "wan", "model.compile_blocks": "true"}, "not go with compile_blocks"),
    ],
)
def test_recipes_that_cannot_are_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(RecipeError, match=f"context_parallel: .*{told}"):
        config.load("embedded", [*changes.items(), ("model.context_parallel", "2")])


def test_attention_that_cannot_exchange_is_refused() -> None:
    network = families.videos.wan_transformer(1)
    assert _attention.choose(network, "auto", masked=False, shared=True) == "native"
    with pytest.raises(ValueError, match=r"context_parallel for others alone: .*flash, .*native"):
        _attention.choose(network, "_native_math", masked=False, shared=True)
