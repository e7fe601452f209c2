"""Bytes the kernels load and store against what the documentation says of each op."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops._backends import launcher
from tests.support.ops.triton_support import coefficients, interpret, rows, traffic

BATCH, ELEMENTS = 1, 16384
X, V, X_NEXT, V_REF = (rows(BATCH, ELEMENTS, seed=i) for i in range(4))
COEF, ROW, IDS = coefficients(BATCH), torch.ones(BATCH), torch.arange(BATCH)
NOISE = (5, IDS, 3, None, None, 1.0, None)


def documented(function: Callable[..., Any], direction: str = "") -> int:
    text = function.__doc__ or ""
    found = re.search(rf"Traffic per element \(fp32\){direction}: (\d+) bytes", text)
    assert found is not None, f"{function.__name__}{direction}"
    return int(found[1])


def _backward_factors() -> Tensor:
    return torch.ones(BATCH, 2)


SCORE = (X, V, X_NEXT, COEF)
CALLS: dict[str, tuple[int, str, Callable[[], tuple[Any, ...]]]] = {
    "philox_normal": (
        documented(ops.philox_normal),
        "philox_normal",
        lambda: (ELEMENTS, 5, IDS, 3, None, torch.float32),
    ),
    "sde_step": (documented(ops.sde_step), "sde_step", lambda: (X, V, COEF, *NOISE, False, False)),
    "sde_step_x0": (
        documented(ops.sde_step_x0),
        "sde_step",
        lambda: (X, V, COEF, *NOISE, True, False),
    ),
    "sde_step_": (
        documented(ops.sde_step_),
        "sde_step_",
        lambda: (X.clone(), V, COEF, *NOISE, False),
    ),
    "sde_logprob": (
        documented(ops.sde_logprob),
        "sde_logprob",
        lambda: (*SCORE, None, 1.0, True, False),
    ),
    "sde_logprob backward": (
        documented(ops.sde_logprob, ", backward"),
        "sde_logprob_backward",
        lambda: (ROW, None, *SCORE, None, 1.0, True, False, True, False, False),
    ),
    "tweedie": (documented(ops.tweedie), "tweedie", lambda: (X, V, None, 0.5)),
    "tweedie_": (documented(ops.tweedie_), "tweedie_", lambda: (X, V.clone(), ROW, 0.0)),
    "policy_loss": (
        documented(ops.policy_loss),
        "policy_loss",
        lambda: (*SCORE, ROW, ROW, None, 1.0, V_REF, 0.1, 0.1, 0.04, None, None, False),
    ),
    "policy_loss backward": (
        documented(ops.policy_loss, ", backward"),
        "policy_loss_backward",
        lambda: (ROW[0], *SCORE, _backward_factors(), None, 1.0, V_REF),
    ),
    "policy_loss, re-centred": (
        documented(ops.policy_loss) + 4,
        "policy_loss",
        lambda: (*CALLS["policy_loss"][2]()[:-1], False, True, V_REF),
    ),
    "policy_loss backward, re-centred": (
        documented(ops.policy_loss, ", backward") + 4,
        "policy_loss_backward",
        lambda: (ROW[0], *SCORE, _backward_factors(), None, 1.0, V_REF, V_REF),
    ),
    "policy_loss backward, re-centred, no reference": (
        documented(ops.policy_loss, ", backward") - 4,
        "policy_loss_backward",
        lambda: (ROW[0], *SCORE, _backward_factors(), None, 1.0, None, V_REF),
    ),
    "policy_loss backward in place": (
        documented(ops.policy_loss, ", backward"),
        "policy_loss_backward_",
        lambda: (ROW[0], X, V.clone(), X_NEXT, COEF, _backward_factors(), None, 1.0, V_REF),
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_traffic_is_the_documented_one(name: str) -> None:
    """Each latent once; what rows and shares add stays under 2 % of that."""
    per_element, op, arguments = CALLS[name]
    with traffic() as bytes_moved:
        interpret(launcher(op), *arguments())
    nominal = per_element * BATCH * ELEMENTS
    assert nominal <= bytes_moved.total < 1.02 * nominal
    assert bytes_moved.stored % (4 * BATCH * ELEMENTS) < 0.02 * nominal


def test_half_precision_halves_the_traffic() -> None:
    x, v = (tensor[:, :4096].to(torch.bfloat16) for tensor in (X, V))
    with traffic() as bytes_moved:
        interpret(launcher("sde_step"), x, v, COEF, *NOISE, False, False)
    nominal = documented(ops.sde_step) // 2 * x.numel()
    assert nominal <= bytes_moved.total < 1.02 * nominal


def test_guidance_adds_the_tensor_it_reads() -> None:
    x, v, x_next, v_uncond = (tensor[:, :4096] for tensor in (X, V, X_NEXT, V_REF))
    score = (x, v, x_next, COEF, v_uncond, 4.5, True)
    for with_mean, per_element in ((False, 16), (True, 20)):
        with traffic() as bytes_moved:
            interpret(launcher("sde_logprob"), *score, with_mean)
        nominal = per_element * x.numel()
        assert nominal <= bytes_moved.total < 1.02 * nominal


@pytest.mark.parametrize("op", ["gain_advantages", "gain_advantages_"])
def test_advantages_read_their_few_rewards_several_times(op: str) -> None:
    """8 bytes per element from memory; the passes of the statistics read them from cache."""
    assert documented(ops.gain_advantages) == 8
    rewards = rows(2, 24 * 11).reshape(2, 24, 11)
    with traffic() as bytes_moved:
        interpret(launcher(op), rewards, 0, None, 5.0)
    assert bytes_moved.stored == 4 * 2 * 24 * 10
    assert bytes_moved.loaded < 8 * 4 * rewards.numel()
