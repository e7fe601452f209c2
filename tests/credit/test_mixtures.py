"""Several rewards become one advantage: known answers, what scale does and does not do."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sfgrpo import config, credit
from sfgrpo.config import Credit
from sfgrpo.credit import Rewards
from sfgrpo.credit.mixtures import by_rule
from sfgrpo.names import MIXTURE

ALL = torch.ones(6, dtype=torch.bool)
DDIM = torch.tensor([False, True, True, True, True, False])
RULES = list(product(["stepwise", "uniform"], ["joint", "per_step", "centered"]))
ROOT = math.sqrt(3)


def two(a: list, b: list, **options) -> Rewards:
    scores = {"a": torch.tensor(a, dtype=torch.float32), "b": torch.tensor(b, dtype=torch.float32)}
    return Rewards(scores=scores, weights={"a": 1.0, "b": 1.0}, **options)


def drawn(final_only: str = "", *, steps: Tensor = DDIM, **options) -> Rewards:
    """Three groups of eight, weights 0.7 and 2, as they come from sampling."""
    noise = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(3, 8, 7, generator=noise) for name in "ab"}
    given = Rewards(
        scores=scores, weights={"a": 0.7, "b": 2.0}, final_only=frozenset(final_only.split())
    )
    asked = Credit(**options)
    return credit.filled(given, credit.scored_states(steps, asked), steps, asked)


def scaled(rewards: Rewards, **factors: float) -> Rewards:
    scores = {name: factors.get(name, 1.0) * s for name, s in rewards.scores.items()}
    return replace(rewards, scores=scores)


def close(found: Tensor, expected: list) -> None:
    known = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


UNIFORM = {
    # mean 50.5, variance (2 x 50.5^2 + 2 x 49.5^2) / 4 = 2500.25: the small reward hardly counts
    "sum": [[1.00995, 0.98995, -0.98995, -1.00995], [1, -1, 1, -1]],
    # (1 -1 1 -1) + (1 1 -1 -1), and (1 -1 1 -1) + 0; over the batch: mean 0, variance 12 / 8
    "gdpo": [[2 / 1.5**0.5, 0, 0, -2 / 1.5**0.5], [x / 1.5**0.5 for x in (1, -1, 1, -1)]],
    "dr_grpo": [[50.5, 49.5, -49.5, -50.5], [0.5, -0.5, 0.5, -0.5]],
    # of equals pairwise, rank 1.5 or 3.5 of 4: z = +-1 / sqrt(15 / 12)
    "ranks": [[1.26491, 0, 0, -1.26491], [x * 0.632456 for x in (1, -1, 1, -1)]],
}


@pytest.mark.parametrize("mixture", UNIFORM)
def test_final_rewards_a_hundredfold_apart(mixture: str) -> None:
    """Two groups of four; in the second the large reward says nothing."""
    small, large = [[1, 0, 1, 0], [1, 0, 1, 0]], [[100, 100, 0, 0], [40, 40, 40, 40]]
    rewards = two(*(torch.tensor(x)[..., None].expand(2, 4, 2).tolist() for x in (small, large)))
    options = Credit(rule="uniform", mixture=mixture, clamp=None)
    close(credit.advantages(rewards, ALL[:1], options)[..., 0], UNIFORM[mixture])


STEPWISE = {
    # gains 1, 0; 0, 100: mean 25.25, std 43.1589; the step that brought the small reward is blamed
    "sum": [[-0.561877, -0.585047], [-0.585047, 1.731972]],
    # root 3 where the gain is and -1 / root 3 elsewhere, of each; the sum is 2 / root 3 everywhere
    "gdpo": [[1, -1], [-1, 1]],
    "dr_grpo": [[-24.25, -25.25], [-25.25, 74.75]],
    # rank 4, and 2 for three equals: 1.5 and -0.5, over sqrt(15 / 12) sqrt(2)
    "ranks": [[0.632456, -0.632456], [-0.632456, 0.632456]],
}


@pytest.mark.parametrize("mixture", STEPWISE)
def test_gains_a_hundredfold_apart(mixture: str) -> None:
    """One step of one trajectory brings the small reward, one of the other the large."""
    rewards = two([[[0, 1, 1], [0, 0, 0]]], [[[0, 0, 0], [0, 0, 100]]])
    options = Credit(mixture=mixture, clamp=None)
    close(credit.advantages(rewards, ALL[:2], options), [STEPWISE[mixture]])


FINAL_ONLY = {
    # gains 1 + 0, 0 + 0; 50, 50: mean 25.25, std 24.7525
    "sum": [[-0.979698, -1.020098], [0.999898, 0.999898]],
    # (root 3, -1 / root 3; twice -1 / root 3) + (-1, -1; 1, 1), of standard deviation 0.919402
    "gdpo": [[0.796225, -1.715627], [0.459701, 0.459701]],
    "dr_grpo": [[-24.25, -25.25], [24.75, 24.75]],
    # (1.5, -0.5; -0.5, -0.5) + (-1, -1; 1, 1), over sqrt(15 / 12) sqrt(2)
    "ranks": [[0.316228, -0.948683], [0.316228, 0.316228]],
}


@pytest.mark.parametrize("mixture", FINAL_ONLY)
def test_a_reward_of_final_images_counts_alike_in_every_step(mixture: str) -> None:
    """The large reward has no estimates: 0 stands where nothing was asked."""
    small, large = [[[0, 1, 1], [0, 0, 0]]], [[[0, 0, 0], [0, 0, 100]]]
    options = Credit(mixture=mixture, clamp=None)
    rewards = credit.filled(
        two(small, large, final_only=frozenset("b")), torch.tensor([0, 1, 2]), ALL[:2], options
    )
    assert rewards.scores["b"].tolist() == [[[0, 0, 0], [0, 50, 100]]]
    close(credit.advantages(rewards, ALL[:2], options), [FINAL_ONLY[mixture]])


@pytest.mark.parametrize("final_only", ["", "a", "b", "a b"])
@pytest.mark.parametrize("mixture", ["gdpo", "ranks"])
@pytest.mark.parametrize(("rule", "normalize"), RULES)
def test_the_scale_of_one_reward_does_not_matter(
    mixture: str, rule: str, normalize, final_only: str
) -> None:
    options = Credit(mixture=mixture, rule=rule, normalize=normalize)
    rewards = drawn(final_only, rule=rule)
    found = credit.advantages(rewards, DDIM, options)
    assert found[..., DDIM].square().mean().sqrt() > 0.5
    for factors in ({"a": 128.0}, {"b": 0.01}, {"a": 1e4, "b": 1e-2}):
        again = credit.advantages(scaled(rewards, **factors), DDIM, options)
        torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    summed = options.model_copy(update={"mixture": "sum"})
    moved = credit.advantages(scaled(rewards, a=128.0), DDIM, summed)
    assert not torch.allclose(moved, credit.advantages(rewards, DDIM, summed), atol=0.1)


@pytest.mark.parametrize("final_only", ["", "b"])
@pytest.mark.parametrize(("rule", "normalize"), RULES)
def test_dr_grpo_is_linear(rule: str, normalize, final_only: str) -> None:
    options = Credit(mixture="dr_grpo", rule=rule, normalize=normalize, clamp=None)

    def found(**factors: float) -> Tensor:
        rewards = scaled(drawn(final_only, rule=rule), **factors)
        return credit.advantages(rewards, DDIM, options)

    one, other = found(b=0.0), found(a=0.0)
    torch.testing.assert_close(found(a=3.0, b=-50.0), 3 * one - 50 * other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, other, atol=0.1)


def test_ranks_ignore_how_far_an_outlier_lies() -> None:
    options, rewards = Credit(mixture="ranks", rule="uniform"), drawn(rule="uniform")
    found = credit.advantages(rewards, DDIM, options)
    best = rewards.scores["b"][0, :, -1].argmax()
    rewards.scores["b"][0, best, -1] = 1e6
    assert torch.equal(credit.advantages(rewards, DDIM, options), found)


@pytest.mark.parametrize("mixture", ["sum", "gdpo", "dr_grpo", "ranks"])
@pytest.mark.parametrize("stride", [1, 3])
def test_of_final_images_alone_all_credit_is_uniform(mixture: str, stride: int) -> None:
    """Up to Dr.GRPO's units, where a gain is a share of the reward; no estimate is scored."""
    options = Credit(mixture=mixture, stride=stride, clamp=None)
    scored = credit.scored_states(DDIM, options, final_only=True)
    assert scored.tolist() == [6] * 7
    found = credit.advantages(drawn("a b", stride=stride), DDIM, options)
    alike = options.model_copy(update={"rule": "uniform"})
    expected = credit.advantages(drawn(rule="uniform"), DDIM, alike)
    blocks = 4 // stride + (stride > 1) if mixture == "dr_grpo" else 1
    torch.testing.assert_close(blocks * found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixture", ["sum", "gdpo", "dr_grpo", "ranks"])
@pytest.mark.parametrize("statistics", ["trainable", "all"])
def test_steps_of_a_block_share_their_credit_and_others_have_none(mixture: str, statistics) -> None:
    options = Credit(mixture=mixture, stride=2, statistics=statistics, clamp=None)
    found = credit.advantages(drawn("b", stride=2, statistics=statistics), DDIM, options)
    first = [1, 3] if statistics == "trainable" else [2]  # of all steps, 1 and 4 stand apart
    for k in first:
        torch.testing.assert_close(found[..., k], found[..., k + 1], rtol=1e-4, atol=1e-4)
    assert not found[..., ~DDIM].any()
    assert (found[..., DDIM].std((1, 2)) > 0.05).all()


def test_gdpo_is_limited_after_the_sum_and_may_leave_the_batch_alone() -> None:
    rewards = two([[[0, 1, 1], [0, 0, 0]]], [[[0, 0, 0], [0, 0, 100]]])
    plain = Credit(mixture="gdpo", mixture_options={"batch": False}, clamp=None)
    part = 2 / ROOT
    close(credit.advantages(rewards, ALL[:2], plain), [[[part, -part], [-part, part]]])
    limited = plain.model_copy(update={"clamp": 1.0})
    assert credit.advantages(rewards, ALL[:2], limited).abs().eq(1).all()


@pytest.mark.parametrize("mixture", ["gdpo", "ranks", "dr_grpo", "sum"])
def test_a_batch_without_differences_teaches_nothing(mixture: str) -> None:
    flat = torch.tensor([0.1, 0.2, 0.3]).expand(2, 4, 3)
    rewards = Rewards(scores={"a": flat, "b": 100 * flat}, weights={"a": 1.0, "b": 1.0})
    options = Credit(mixture=mixture, normalize="per_step")
    assert not credit.advantages(rewards, ALL[:2], options).any()


def worst(rewards, trainable_T, options, *, least: str = "a"):
    return by_rule(rewards.scores[least], trainable_T, options)


def test_a_mixture_is_one_function_of_ones_own() -> None:
    name = f"{__name__}:worst"
    options = Credit(mixture=name, mixture_options={"least": "b"})
    rewards = drawn()
    expected = credit.advantages(rewards.scores["b"], DDIM)
    assert torch.equal(credit.advantages(rewards, DDIM, options), expected)
    with pytest.raises(ValueError, match=r"worst': unknown option 'leas'; did you mean 'least'"):
        credit.mixture(Credit(mixture=name, mixture_options={"leas": "b"}))
    with pytest.raises(config.RecipeError, match=r"credit.mixture: .* did you mean 'gdpo'"):
        config.load("embedded", [("credit.mixture", "gdop")])
    assert MIXTURE.names() == ["dr_grpo", "gdpo", "ranks", "sum"]


def short(rewards, trainable_T, options):
    return rewards.total


def test_a_mixture_that_returns_another_shape_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"mixture '.*:short' returned shape \(3, 8, 7\), expected"
    ):
        credit.advantages(drawn(), DDIM, Credit(mixture=f"{__name__}:short"))
