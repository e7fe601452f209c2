"""What the doctor says of an iteration's cost, and of settings that are known to disappoint."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfgrpo import config
from sfgrpo.doctor import advice, footprint, skeleton, text, twins
from sfgrpo.generator import load

SIGMAS = torch.linspace(1, 0, 11)
"""Ten steps, of which DDIM-SDE draws no noise in the first and the last."""


def recipe(**changes: str) -> config.Recipe:
    return config.load("embedded", [(k.replace("__", "."), v) for k, v in changes.items()])


def test_a_recipe_beside_its_uniform_twin() -> None:
    """Euler T' = 5 of eight noisy steps, the first from a state of the group's; 8 groups of 12."""
    given = recipe(
        credit__solver="euler", credit__solver_options="{substeps: 5}",
        train__updates_per_iteration="1", sample__window="null",
    )  # fmt: skip
    found = twins.compare(given, SIGMAS, 1, (100, 250))
    rows = 96 * 8
    sampled = 2 * 8 + 8 * 96
    assert found.uniform == {
        "velocity": sampled + rows, "gradient": rows, "decoded": 96, "scored": 96,
    }  # fmt: skip
    scored = 8 + 7 * 96
    assert found.recipe == {
        "velocity": sampled + rows + 4 * scored, "gradient": rows,
        "decoded": 96 + scored, "scored": 96 + scored,
    }  # fmt: skip
    extra = 4 * scored + 2.5 * scored
    uniform = sampled + rows + 3 * rows + 2.5 * 96
    assert found.ratio == pytest.approx(1 + extra / uniform)
    checkpointed = given.train.model_copy(update={"gradient_checkpointing": True})
    dearer = given.model_copy(update={"train": checkpointed})
    assert twins.compare(dearer, SIGMAS, 1, (100, 250)).rows(found.uniform) == uniform + rows


def test_a_moving_window_costs_its_mean() -> None:
    """Behind the first noisy step a state is one for each trajectory: a window that starts one step
    later shares one state more."""
    window = "{steps: 1, schedule: progressive, interval: 1, continuation: steps}"
    places = [
        twins.compare(
            recipe(sample__window=f"{{steps: 1, range: [{k}, {k + 1}], continuation: steps}}"),
            SIGMAS, 1, (1, 1),
        ).uniform["velocity"]
        for k in range(1, 9)
    ]  # fmt: skip
    assert [after - before for before, after in pairwise(places)] == [-88] * 7
    moving = twins.compare(recipe(sample__window=window, run__iterations="8"), SIGMAS, 1, (1, 1))
    assert moving.uniform["velocity"] == sum(places) / 8


def test_what_rewards_of_final_images_see_is_foretold() -> None:
    """One of two saves its scores of 8 + 3 x 96 clean estimates, both save the estimates."""
    window = "{steps: 4, range: [1, 5]}"
    one = twins.compare(
        recipe(reward_final_only="[colour]", sample__window=window), SIGMAS, 1, (1, 1)
    )
    assert one.recipe["scored_final"] == one.uniform["scored_final"] == 96
    assert one.recipe["scored"] == 96 + 8 + 3 * 96
    (line,) = [line for line in text.cost_lines(one) if "final images alone" in line]
    assert "see 96 of the samples scored" in line
    both = twins.compare(recipe(reward_final_only="[ocr, colour]"), SIGMAS, 1, (1, 1))
    assert both.recipe == both.uniform
    assert both.recipe["scored"] == both.recipe["decoded"] == 96
    none = twins.compare(recipe(), SIGMAS, 1, (1, 1))
    assert "scored_final" not in none.recipe
    assert not any("final images" in line for line in text.cost_lines(none))


def test_the_twin_takes_no_options_of_another_rule() -> None:
    given = recipe(credit__rule="mine:rule", credit__options="{temperature: 2}")
    assert twins.twin(given).credit == config.Credit(rule="uniform")


@pytest.mark.parametrize("guidance", ["1", "3"])
def test_operations_are_those_of_the_real_network(guidance: str) -> None:
    given = recipe(sample__guidance_scale=guidance)
    row, decode = footprint.flops(given, skeleton.skeleton(given))
    backbone = load(given, "cpu")
    x, cond = torch.randn(1, *backbone.latent_shape(32, 32)), backbone.encode(["a red one"])
    # The counter knows no formula of PyTorch's fused attention on CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as network:
            backbone.velocity(backbone.transformer, x, torch.ones(1), cond)
        with FlopCounterMode(display=False) as decoder:
            backbone.decode(x)
    assert (row, decode) == (network.get_total_flops(), decoder.get_total_flops())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"credit__solver": "tweedie"}, ["T' = 1"]),
        ({"credit__solver": "euler", "credit__solver_options": "{substeps: 1}"}, ["T' = 1"]),
        ({"credit__solver": "euler"}, []),
        ({"credit__solver": "tweedie", "credit__rule": "uniform"}, []),
        ({"credit__solver": "tweedie", "sample__window": "{steps: 2, range: [7, 9]}"}, []),
        ({"sample__window": "{steps: 1}"}, ["share one gain"]),
        ({"sample__window": "{steps: 1}", "credit__rule": "uniform"}, []),
        ({"credit__stride": "10"}, ["share one gain"]),
        ({"sample__eta": "0.02"}, ["steps draw hardly any noise"]),
        ({"sample__eta": "0.02", "sample__window": "{steps: 1, range: [1, 2]}"}, ["one gain"]),
        ({"sample__eta": "0.02", "sample__min_noise": "0.02"}, ["has no noisy step"]),
        ({"train__old_logp": "sampling"}, []),
        ({"train__old_logp": "sampling", "model__dtype": "bf16"}, ["train.old_logp sampling"]),
    ],
    ids=str,
)
def test_settings_that_disappoint(changes: dict[str, str], said: list[str]) -> None:
    given = recipe(train__updates_per_iteration="1", **changes)
    try:
        told = [note.what for note in advice.notes(given, SIGMAS)]
    except ValueError as error:  # a recipe that cannot run
        told = [str(error)]
    assert len(told) == len(said), told
    assert all(part in what for part, what in zip(said, told, strict=True))
