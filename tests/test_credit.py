"""Credit rules: gains telescope, statistics are the group's, masked steps take no part."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import credit
from sfgrpo.config import Credit
from sfgrpo.names import RULE

ALL = torch.ones(6, dtype=torch.bool)
UNIFORM = Credit(rule="uniform")


@pytest.fixture
def rewards() -> torch.Tensor:
    return torch.rand(
        3, 8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).float()


def test_gains_telescope(rewards: torch.Tensor) -> None:
    total = credit.gains(rewards).sum(-1)
    torch.testing.assert_close(total, rewards[..., -1] - rewards[..., 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", ["joint", "per_step", "centered"])
def test_stepwise_ignores_scale_and_offset_of_the_reward(rewards: torch.Tensor, normalize) -> None:
    options = Credit(normalize=normalize, clamp=None)
    first = credit.advantages(rewards, ALL, options)
    second = credit.advantages(100 * rewards + 7, ALL, options)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_joint_statistics_are_those_of_the_whole_group(rewards: torch.Tensor) -> None:
    found = credit.advantages(rewards, ALL, Credit(clamp=None))
    torch.testing.assert_close(found.mean((1, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.square().mean((1, 2)), torch.ones(3), rtol=1e-5, atol=0)


def test_uniform_is_the_final_reward_of_flow_grpo(rewards: torch.Tensor) -> None:
    found = credit.advantages(rewards, ALL, UNIFORM)
    final = rewards[..., -1]
    expected = (final - final.mean(1, keepdim=True)) / final.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(found, expected[..., None].expand_as(found), rtol=1e-5, atol=1e-5)


def test_uniform_reads_the_final_reward_alone(rewards: torch.Tensor) -> None:
    alone = torch.zeros_like(rewards)
    alone[..., -1] = rewards[..., -1]
    assert not credit.get(UNIFORM).estimates
    torch.testing.assert_close(
        credit.advantages(alone, ALL, UNIFORM),
        credit.advantages(rewards, ALL, UNIFORM),
    )


def test_masked_steps_get_nothing_and_shift_nothing(rewards: torch.Tensor) -> None:
    mask = torch.tensor([False, True, True, True, True, False])
    found = credit.advantages(rewards, mask)
    assert (found[..., [0, 5]] == 0).all()
    changed = rewards.clone()
    changed[..., 0] += 5  # only the gain of the masked first step
    torch.testing.assert_close(credit.advantages(changed, mask), found, rtol=1e-4, atol=1e-4)
    over_all = Credit(statistics="all")
    assert (credit.advantages(rewards, mask, over_all)[..., [0, 5]] == 0).all()
    assert not torch.allclose(credit.advantages(changed, mask, over_all), found, atol=1e-2)


@pytest.mark.parametrize("stride", [2, 4])
def test_stride_credits_blocks(rewards: torch.Tensor, stride: int) -> None:
    options = Credit(stride=stride, clamp=None)
    found = credit.advantages(rewards, ALL, options)
    for start in range(0, 6, stride):
        block = found[..., start : start + stride]
        torch.testing.assert_close(block, block[..., :1].expand_as(block), rtol=0, atol=1e-4)


DDIM = torch.tensor([False, True, True, True, True, False])
SCORED = [
    ({}, [1, 1, 2, 3, 4, 6, 6]),  # the noise-free ends have the rewards of what they lead to
    ({"stride": 2}, [1, 1, 3, 3, 6, 6, 6]),
    ({"stride": 3}, [1, 1, 4, 4, 4, 6, 6]),
    ({"stride": 6}, [1, 1, 6, 6, 6, 6, 6]),
    ({"statistics": "all"}, [0, 1, 2, 3, 4, 5, 6]),  # every gain counts
    ({"statistics": "all", "stride": 4}, [0, 4, 4, 4, 4, 6, 6]),
    ({"rule": "uniform"}, [6] * 7),
]


@pytest.mark.parametrize(("options", "expected"), SCORED)
def test_no_state_is_scored_that_no_gain_needs(options: dict, expected: list[int]) -> None:
    assert credit.scored_states(DDIM, Credit(**options)).tolist() == expected


@pytest.mark.parametrize(("options", "where"), SCORED)
def test_what_fills_the_other_states_changes_no_advantage(
    rewards: torch.Tensor, options: dict, where: list[int]
) -> None:
    """Where the ODE leads to the same estimate, the rewards of all states give these, too."""
    rewards[..., 0], rewards[..., 5] = rewards[..., 1], rewards[..., 6]
    known = credit.advantages(rewards, DDIM, Credit(**options))
    filled = credit.advantages(rewards[..., where], DDIM, Credit(**options))
    torch.testing.assert_close(filled, known, rtol=1e-4, atol=1e-4)


def test_blocks_are_of_noisy_steps(rewards: torch.Tensor) -> None:
    """Noisy steps 1, 2 are one block and 4 is the next, whose state at the end is the image's."""
    mask = torch.tensor([False, True, True, False, True, False])
    found = credit.advantages(rewards, mask, Credit(stride=2, clamp=None))
    gains = torch.stack([rewards[..., 4] - rewards[..., 1], rewards[..., 6] - rewards[..., 4]], -1)
    steps = gains[..., [0, 0, 1]].flatten(1).double()
    expected = (steps - steps.mean(1, keepdim=True)) / steps.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(found[..., mask].flatten(1).double(), expected, rtol=1e-3, atol=1e-4)


def test_one_block_of_all_steps_is_uniform_up_to_scale(rewards: torch.Tensor) -> None:
    """From a common start, the gain of the whole trajectory is the final reward, shifted."""
    rewards = rewards.clone()
    rewards[..., 0] = 0.3
    options = Credit(stride=6, clamp=None)
    found = credit.advantages(rewards, ALL, options)
    alike = options.model_copy(update={"rule": "uniform"})
    uniform = credit.advantages(rewards, ALL, alike)
    torch.testing.assert_close(found, uniform, rtol=1e-3, atol=1e-3)


def test_a_group_without_differences_teaches_nothing() -> None:
    rewards = torch.linspace(0.1, 0.9, 7).expand(2, 8, 7).contiguous()
    for normalize in ("per_step", "centered"):
        options = Credit(normalize=normalize)
        assert (credit.advantages(rewards, ALL, options) == 0).all()
    assert (credit.advantages(rewards, ALL, UNIFORM) == 0).all()


def test_clamp(rewards: torch.Tensor) -> None:
    rewards = rewards.clone()
    rewards[0, 0, -1] = 1e4
    assert credit.advantages(rewards, ALL).abs().max() == 5


def test_unknown_rule(rewards: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="did you mean 'stepwise'"):
        credit.advantages(rewards, ALL, Credit.model_construct(rule="stepwize"))


def test_a_rule_is_added_by_one_function(
    rewards: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULE.registered, "last", None)

    @credit.rule("last", estimates=False)
    def last(rewards_PNS, trainable_T, options, *, scale: float = 1.0):
        return scale * rewards_PNS[..., -1:].expand(*rewards_PNS.shape[:2], len(trainable_T))

    found = credit.advantages(rewards, ALL, Credit(rule="last", options={"scale": 2.0}))
    torch.testing.assert_close(found[..., 0], 2 * rewards[..., -1])
    with pytest.raises(ValueError, match="'last': unknown option 'scal'; did you mean 'scale'"):
        credit.get(Credit(rule="last", options={"scal": 2.0}))
    with pytest.raises(ValueError, match="'uniform' has no options, got 'scale'"):
        credit.get(Credit(rule="uniform", options={"scale": 2.0}))


def test_a_rule_that_returns_another_shape_is_named(
    rewards: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULE.registered, "short", lambda rewards, trainable, options: rewards)
    with pytest.raises(ValueError, match=r"'short' returned shape \(3, 8, 7\), expected \(3, 8, 6"):
        credit.advantages(rewards, ALL, Credit(rule="short"))


def none(rewards, trainable_T, options):
    """A rule, and a mixture, that forgot to return."""


def failing(rewards, trainable_T, options):
    raise KeyError("gain")


@pytest.mark.parametrize("kind", ["rule", "mixture"])
def test_what_a_rule_of_ones_own_does_wrong_is_an_error_of_credit(
    rewards: torch.Tensor, kind: str
) -> None:
    with pytest.raises(credit.CreditError, match=r":none' returned NoneType, expected \(3, 8, 6\)"):
        credit.advantages(rewards, ALL, Credit.model_validate({kind: f"{__name__}:none"}))
    with pytest.raises(
        credit.CreditError, match=r"failed: .*_credit.py, line .*: KeyError: 'gain'"
    ):
        credit.advantages(rewards, ALL, Credit.model_validate({kind: f"{__name__}:failing"}))
