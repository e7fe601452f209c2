"""The recipes of published models: their numbers fit together, and the runs fit into memory."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

from sfgrpo import backbones, config, generator, rewards
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.doctor import examination as doctor
from sfgrpo.doctor import footprint, memory, published
from sfgrpo.doctor.machine import GIB
from sfgrpo.doctor.skeleton import skeleton
from sfgrpo.layout import Layout

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "memory_published.md"
"""Written by `python -m benchmarks.trainer.footprints`; what a recipe asks for is in bold there."""
NAMES = [
    name for name in config.recipe_names() if config.load(name).model.path not in backbones.EMBEDDED
]
MEASURED = ("sd35_medium", "lumina2", "wan21_1.3b")
"""Computed here, too: of larger networks it takes half a minute each, and that is the table's."""
RANKS, DEVICE = 8, 80 * GIB
CALLS = re.compile(
    r"needs ([\d.]+) gib per rank on 8 ranks: sfgrpo doctor (\S+) --world 8\.\n", re.I
)


def text(name: str) -> str:
    """The file of a recipe."""
    return (files("sfgrpo.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def backbone(name: str) -> PipelineBackbone:
    """The recipe's backbone without weights, and without the adapters, which take longest to make:
    what runs with them is in the table."""
    return skeleton(config.load(name, [("lora", "null")]))


@cache
def needed(name: str) -> float:
    """GiB of one of `RANKS` ranks at its worst moment, as the recipe is."""
    recipe = config.load(name)
    network, (work,) = footprint.measure(recipe, RANKS, (recipe.train.gradient_checkpointing,))
    return memory.total(network, doctor.setting(recipe, network, RANKS), work)[0] / GIB


@pytest.mark.parametrize("name", NAMES)
def test_its_parts_are_there(name: str) -> None:
    recipe = config.load(name)
    model = published.find(recipe.model.path)
    assert model
    made = {kind.__name__ for kind in backbone(name).pipeline_classes}
    assert model.pipeline in made
    assert recipe.lora
    layers = [n for n, m in backbone(name).transformer.named_modules() if isinstance(m, nn.Linear)]
    for target in recipe.lora.targets or backbone(name).lora_targets:
        assert any(f".{layer}".endswith(f".{target}") for layer in layers), target
    assert set(recipe.reward) <= set(rewards.available())
    found = generator.prompts_of(recipe)
    assert not {p.text for p in found.train} & {p.text for p in found.evaluation}
    assert len(found.evaluation) >= recipe.eval.prompts
    assert len(found.train) >= recipe.sample.prompts_per_iteration
    if "text" in recipe.reward:
        assert all(p.metadata["text"] for p in (*found.train, *found.evaluation))


@pytest.mark.parametrize("name", NAMES)
def test_its_numbers_fit_together(name: str) -> None:
    """Size, schedule and split of the work on one rank and on eight; full micro-batches alone."""
    recipe = config.load(name)
    shape = backbone(name).latent_shape(*recipe.model.size)
    sigmas = backbone(name).sigmas(recipe.sample.num_steps, shape)
    assert len(backbone(name).sigmas(recipe.eval.num_steps, shape)) == recipe.eval.num_steps + 1
    for world in (1, RANKS):
        layout = Layout(recipe, sigmas, rank=world - 1, world=world, device=torch.device("cpu"))
        assert layout.rows_per_update % recipe.train.micro_batch_size == 0
    said = re.search(r"divides the (\d+) noisy steps", text(name))
    assert said
    assert int(said[1]) == int(layout.schedule(0).trainable_T.sum())


@pytest.mark.parametrize("name", NAMES)
def test_ratios_are_clipped_alike(name: str) -> None:
    """1e-4 is Flow-GRPO's for the 65,536 elements of SD3.5 at 512 pixels. The log-ratio of a mean
    over D independent elements spreads like 1 / sqrt(D)."""
    recipe = config.load(name)
    elements = torch.Size(backbone(name).latent_shape(*recipe.model.size)).numel()
    assert recipe.train.clip_range == pytest.approx(1e-4 * (65_536 / elements) ** 0.5, rel=0.1)


def tabled(name: str) -> float:
    """GiB of the same in the table of results."""
    found = re.search(
        rf"^\| {re.escape(name)}, with.*\*\*[\d.]+, ([\d.]+) \w+\*\*", TABLE.read_text(), re.M
    )
    assert found, f"'{TABLE}' has no line of {name}"
    return float(found[1])


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_and_says_what_it_needs(name: str) -> None:
    said = CALLS.search(text(name))
    assert said
    assert said[2] == name
    assert tabled(name) == float(said[1])
    # Room for PickScore beside it.
    assert memory.fits(int((tabled(name) + 4) * GIB), DEVICE)


@pytest.mark.parametrize("name", MEASURED)
def test_the_table_is_what_the_doctor_computes(name: str) -> None:
    assert needed(name) == pytest.approx(tabled(name), abs=0.06)


def test_listing_recipes_builds_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    from sfgrpo import cli

    assert cli.main(["recipes"]) == 0
    assert set(NAMES) < set(capsys.readouterr().out.split())
