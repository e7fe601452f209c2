"""Checks made once for every kind of arguments: what is a kind, and that none slips through."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops import _remember
from tests.support.ops.cases import rows


class Asked:
    """A check that counts how often it is asked and refuses negative numbers."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        self.times += 1
        if any(isinstance(arg, float) and arg < 0 for arg in args):
            raise ValueError("negative")
        return args[1:]

    __name__ = "asked"


X = torch.ones(2, 3)
KINDS: list[tuple[Any, ...]] = [
    (X, 1.0),
    (X, True),
    (X, 1),
    (X, (1.0, 1.0)),
    (X, (1.0, True)),
    (X, None),
    (X[:1], 1.0),
    (X.double(), 1.0),
    (X.to("meta"), 1.0),
    (X.clone().requires_grad_(), 1.0),
    (torch.nn.Parameter(X.clone()), 1.0),
    (None, 1.0),
]


def test_every_kind_is_asked_about_once() -> None:
    asked = Asked()
    check = _remember.remembered(asked)
    for time in range(2):
        for index, args in enumerate(KINDS):
            assert check(*args) == args[1:]
            assert asked.times == (len(KINDS) if time else index + 1)
    check(X + 1, 1.0)  # values of tensors are no kind
    assert asked.times == len(KINDS)
    with torch.no_grad():
        check(X, 1.0)
    assert asked.times == len(KINDS) + 1


def test_what_has_no_hash_is_asked_about_each_time() -> None:
    asked = Asked()
    check = _remember.remembered(asked)
    assert check(X, [1.0]) == check(X, [1.0]) == ([1.0],)
    assert asked.times == 2


def test_a_refusal_is_not_remembered_and_stands_alone() -> None:
    asked = Asked()
    check = _remember.remembered(asked)
    for _ in range(2):
        with pytest.raises(ValueError, match="negative") as error:
            check(X, -1.0)
        assert error.value.__context__ is None
    assert asked.times == 2


def test_sizes_that_never_repeat_do_not_fill_the_memory() -> None:
    asked = Asked()
    check = _remember.remembered(asked)
    with mock.patch.object(_remember, "MOST_KINDS", 3):
        for size in (1, 2, 3, 4, 4, 1):
            check(torch.ones(size))
    assert asked.times == 5  # the fourth kind made room by forgetting the first


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kl_weight", True),
        ("clip_range", (0.1, True)),
        ("ratio", "n"),
        ("v_ref", torch.ones(3, 4, requires_grad=True)),
        ("v_ref", torch.ones(3, 5)),
        ("weights", torch.ones(3, dtype=torch.float64)),
    ],
)
def test_the_loss_refuses_after_it_has_accepted(name: str, wrong: Any) -> None:
    r = rows(3, (4,))
    right: dict[str, Any] = {
        "kl_weight": 1.0, "clip_range": (0.1, 1.0), "v_ref": r.v_ref, "weights": r.weights,
    }  # fmt: skip

    def loss(**options: Any) -> Tensor:
        return ops.policy_loss(r.x, r.v, r.x_next, r.coef, r.logp_old, r.advantages, **options).loss

    first = loss(**right)
    with pytest.raises((TypeError, ValueError), match=name):
        loss(**{**right, name: wrong})
    assert torch.equal(loss(**right), first)
