"""Rows and optimiser steps do not depend on how many ranks share the work."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import sde
from sfgrpo.config import Recipe
from sfgrpo.layout import Layout

CPU = torch.device("cpu")
SIGMAS = torch.linspace(1, 0, 11)


def recipe(**train) -> Recipe:
    sample = {"prompts_per_iteration": 4, "group_size": 6}
    return Recipe.model_validate({"sample": sample, "train": {"micro_batch_size": 50, **train}})


def layouts(given: Recipe, world: int) -> list[Layout]:
    return [Layout(given, SIGMAS, rank=r, world=world, device=CPU) for r in range(world)]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_rows_of_one(world: int) -> None:
    given = recipe(updates_per_iteration=4)
    (alone,) = layouts(given, 1)
    many = layouts(given, world)
    assert torch.equal(
        torch.cat([layout.plan(3).sample_M for layout in many]), alone.plan(3).sample_M
    )
    for update, (trajectory, step) in enumerate(alone.updates(3)):
        expected = set(zip(trajectory.tolist(), step.tolist(), strict=True))
        found = [
            (t + layout.share.start, s)
            for layout in many
            for t, s in zip(*(x.tolist() for x in layout.updates(3)[update]), strict=True)
        ]
        assert len(found) == len(expected)
        assert set(found) == expected


def test_every_noisy_row_is_used_once_and_no_other() -> None:
    (layout,) = layouts(recipe(updates_per_iteration=2), 1)
    pairs = [p for t, s in layout.updates(0) for p in zip(t.tolist(), s.tolist(), strict=True)]
    noisy = [k for k, n in enumerate(layout.schedule(0).table[:, 2].tolist()) if n > 0]
    assert sorted(pairs) == [(m, k) for m in range(24) for k in noisy]
    assert layout.rows_per_update == 24 * len(noisy) // 2
    assert layout.micro_batches == 2  # 96 rows, 50 at a time


def test_a_step_with_too_little_noise_is_the_odes() -> None:
    """The other rows stay; an odd number of steps is dealt out evenly all the same."""
    given = recipe(updates_per_iteration=2)
    whole = layouts(given, 1)[0].schedule(0)
    noise = whole.table[:, 2]
    least = noise[noise > 0].min().item()
    quiet = Recipe.model_validate(
        {**given.model_dump(), "sample": {**given.sample.model_dump(), "min_noise": least * 1.01}}
    )
    for world in (1, 2):
        for layout in layouts(quiet, world):
            schedule = layout.schedule(0)
            (faint,) = layout.faint_T.nonzero().flatten().tolist()
            (told,) = layout.told()
            assert told.startswith("step 8 (0.2 -> 0.1) draws no noise and is not trained")
            ode = sde.coefficients(SIGMAS, "ode")[faint]
            assert torch.equal(schedule.table[faint], ode)
            others = torch.arange(10) != faint
            assert torch.equal(schedule.table[others], whole.table[others])
            assert schedule.trainable_T.sum() == 7
            assert schedule.weight_T[schedule.trainable_T].mean() == pytest.approx(1)
            for trajectory, step in layout.updates(0):
                assert len(step) == layout.rows_per_update == 24 * 7 // 2 // world
                assert faint not in step
                assert set(trajectory.bincount().tolist()) == {3, 4}


def test_noise_that_rounding_swallows_is_left_out() -> None:
    """With so small an eta the last noisy steps of DDIM-SDE fall below fp32 latents' rounding."""
    given = Recipe.model_validate({"sample": {"eta": 5e-6}})
    layout = Layout(given, SIGMAS, rank=0, world=1, device=CPU)
    assert 0 < layout.faint_T.sum() < 8
    assert layout.schedule(0).table[:, 2][layout.schedule(0).trainable_T].min() >= 2**-20


def windowed(**window) -> Recipe:
    sample = {"prompts_per_iteration": 4, "group_size": 6, "window": window}
    return Recipe.model_validate({"sample": sample, "train": {"micro_batch_size": 50}})


def places(given: Recipe, iterations: range) -> list[list[int]]:
    (layout,) = layouts(given, 1)
    return [layout.schedule(i).trainable_T.nonzero().flatten().tolist() for i in iterations]


def test_a_progressive_window_moves_and_begins_again() -> None:
    """MixGRPO's: over the noisy steps 1 .. 8 by `stride` every `interval` iterations."""
    found = places(windowed(steps=4, schedule="progressive", interval=2, stride=2), range(12))
    first = [found[i][0] for i in range(12)]
    assert first == [1, 1, 3, 3, 5, 5, 2, 2, 4, 4, 1, 1]
    assert all(place == list(range(place[0], place[0] + 4)) for place in found)


def test_a_random_window_is_one_for_all_ranks_and_every_place_is_drawn() -> None:
    given = windowed(steps=3)
    found = places(given, range(200))
    assert {place[0] for place in found} == {1, 2, 3, 4, 5, 6}
    assert all(place == list(range(place[0], place[0] + 3)) for place in found)
    assert found == places(given, range(200))
    other = given.model_copy(update={"run": given.run.model_copy(update={"seed": 1})})
    assert found != places(other, range(200))
    for layout in layouts(given, 4):
        assert layout.schedule(7).trainable_T.nonzero().flatten().tolist() == found[7]
        assert layout.rows_per_update == 24 * 3 // 4


def test_a_frozen_window_stays_and_a_range_holds_it() -> None:
    assert places(windowed(steps=2, schedule="frozen"), range(3)) == [[1, 2]] * 3
    inside = places(windowed(steps=2, range=[3, 6]), range(50))
    assert {tuple(place) for place in inside} == {(3, 4), (4, 5)}


@pytest.mark.parametrize("continuation", ["solver", "steps"])
def test_steps_outside_the_window_are_the_odes(continuation: str) -> None:
    given = windowed(steps=2, range=[3, 5], continuation=continuation)
    schedule = layouts(given, 1)[0].schedule(0)
    whole = layouts(recipe(), 1)[0].schedule(0)
    ode = sde.coefficients(SIGMAS, "ode")
    inside = torch.zeros(10, dtype=torch.bool)
    inside[3:5] = True
    noise_free = whole.table[:, 2] == 0
    assert torch.equal(schedule.table[inside | noise_free], whole.table[inside | noise_free])
    assert torch.equal(schedule.table[~inside & ~noise_free], ode[~inside & ~noise_free])
    assert torch.equal(schedule.weight_T, whole.weight_T * inside)
    assert schedule.sampled == (5 if continuation == "solver" else 10)


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window: 9 steps do not fit into the 8 noisy ones"):
        layouts(windowed(steps=9), 1)
    with pytest.raises(ValueError, match=r"range: \[3, 4\] holds fewer than steps: 2"):
        windowed(steps=2, range=[3, 4])


def test_iterations_differ_and_repeat_themselves() -> None:
    (layout,) = layouts(recipe(), 1)
    first, again, other = layout.updates(0)[0], layout.updates(0)[0], layout.updates(1)[0]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not set(layout.plan(0).sample_M.tolist()) & set(layout.plan(1).sample_M.tolist())


@pytest.mark.parametrize(
    ("change", "world", "message"),
    [
        ({"updates_per_iteration": 5}, 1, r"iteration: 5 does not divide the 192 rows .*24 .* 8"),
        ({"updates_per_iteration": 16}, 8, "16 does not divide the 24 rows"),
        ({}, 5, "24 trajectories .* 5 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(change: dict, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layouts(recipe(**change), world)


def test_a_sampler_without_noise_is_refused() -> None:
    quiet = Recipe.model_validate({"sample": {"eta": 0.0}})
    with pytest.raises(ValueError, match="no noisy step"):
        Layout(quiet, SIGMAS, rank=0, world=1, device=CPU)


def test_rewards_of_final_images_are_told_once_where_steps_differ() -> None:
    given = {"reward": {"ocr": 0.8, "colour": 20}, "reward_final_only": ["colour"]}
    (line,) = layouts(Recipe.model_validate(given), 1)[0].told()
    assert line.startswith("reward 'colour' scores final images alone")
    uniform = Recipe.model_validate({**given, "credit": {"rule": "uniform"}})
    assert layouts(uniform, 1)[0].told() == []
    with pytest.raises(ValueError, match=r"reward_final_only: unknown reward 'color'; .*'colour'"):
        Recipe.model_validate({**given, "reward_final_only": ["color"]})
