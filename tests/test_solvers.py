"""Solvers: order of convergence and evaluations, on a flow that is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfgrpo import ops, solvers
from sfgrpo.config import Credit
from sfgrpo.names import SOLVER
from sfgrpo.solvers import Method


def velocity(x: Tensor, t: float) -> Tensor:
    """A field that is linear neither in x nor in t. On the flow between two normal distributions,
    the other one that is known, the midpoint rule is better than its order."""
    return x * (1 - x) * (1 + t)


def flow(x: Tensor, t: float) -> Tensor:
    """Where the ODE leads from t to 0: the logit moves by the integral of 1 + t."""
    return torch.sigmoid(torch.logit(x) - t - t**2 / 2)


STATES = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)


def solve(method: Method, x: Tensor, t: float) -> tuple[Tensor, list[float]]:
    """The estimate, and the noise levels at which a velocity was asked for after the first."""
    p, asked = ops.tweedie(x, velocity(x, t), method.first), list[float]()
    if method.rest is None:
        return p, asked
    stages, answer = method.rest(x, p), None
    while True:
        try:
            latents, level = stages.send(answer)  # pyright: ignore[reportArgumentType]
        except StopIteration as done:
            return done.value, asked
        asked.append(level)
        answer = velocity(latents, level)


def error(method: Method, t: float) -> float:
    return float((solve(method, STATES, t)[0] - flow(STATES, t)).abs().max())


def slope(errors: Callable[[float], float], step: float) -> float:
    """The power of the step that the error goes with, from a step and its half."""
    return math.log2(errors(step) / errors(step / 2))


@pytest.mark.parametrize(
    ("function", "order"),
    [(solvers.tweedie, 1), (solvers.euler, 1), (solvers.midpoint, 2), (solvers.third_order, 3)],
)
def test_the_error_of_one_interval_has_the_order_of_the_solver(
    function: Callable[[float], Method], order: int
) -> None:
    """To t = 0 from t and from t / 2: the local error goes with t^(order + 1)."""
    found = slope(lambda t: error(function(t), t), 0.01)
    assert found == pytest.approx(order + 1, abs=0.1)


@pytest.mark.parametrize(
    ("function", "order"), [(solvers.euler, 1), (solvers.third_order, 3), (solvers.exact, 3)]
)
def test_the_error_of_many_substeps_has_the_order_of_the_solver(
    function: Callable[..., Method], order: int
) -> None:
    found = slope(lambda step: error(function(0.8, substeps=round(1 / step)), 0.8), 1 / 64)
    assert found == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("t", [1.0, 0.7, 0.4, 0.1])
def test_exact_is_the_end_of_the_flow(t: float) -> None:
    assert error(solvers.exact(t), t) < 2e-5
    assert error(solvers.exact(t), t) < error(solvers.third_order(t), t) / 300


EVALUATIONS = [
    ("tweedie", {}, 0), ("euler", {}, 4), ("euler", {"substeps": 1}, 0), ("midpoint", {}, 1),
    ("third_order", {}, 2), ("third_order", {"substeps": 3}, 8), ("exact", {}, 47),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "count"), EVALUATIONS)
@pytest.mark.parametrize("t", [1.0, 0.3, 0.0089])
def test_evaluations(name: str, options: dict[str, Any], count: int, t: float) -> None:
    """As many as said, at levels between t and 0, at neither end again."""
    (method,) = solvers.methods(name, options, {0: t}).values()
    _, asked = solve(method, STATES, t)
    assert len(asked) == count
    assert all(0 < level < t for level in asked)
    assert asked == sorted(asked, reverse=True)


def test_the_level_chooses_the_solver() -> None:
    levels = dict(enumerate((1.0, 0.41, 0.4, 0.16, 0.15, 0.01)))
    counts = {"tweedie": 0, "midpoint": 1, "third_order": 2}

    def chosen(**options: float) -> list[int]:
        found = solvers.methods("by_level", options, levels)
        return [len(solve(found[k], STATES, t)[1]) for k, t in levels.items()]

    assert chosen() == [
        counts[n] for n in ("third_order",) * 2 + ("midpoint",) * 2 + ("tweedie",) * 2
    ]
    assert chosen(third_order_above=1, midpoint_above=0) == [1] * 6
    x = STATES
    alone = solve(solvers.midpoint(0.3), x, 0.3)[0]
    assert torch.equal(solve(solvers.by_level(0.3), x, 0.3)[0], alone)


def test_euler_is_the_loop() -> None:
    """Bit for bit, in the precision and with the op that training has."""
    x, t = STATES.float(), 0.9
    expected = x
    for k in range(5):
        expected = ops.tweedie(expected, velocity(expected, t - k * (t / 5)), t / 5)
    found, _ = solve(solvers.euler(t), x, t)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eulr", {}, "unknown solver 'eulr'; did you mean 'euler'"),
        ("euler", {"steps": 5}, "'euler': unknown option 'steps'; did you mean 'substeps'"),
        ("midpoint", {"substeps": 2}, "'midpoint' has no options, got 'substeps'"),
        ("euler", {"substeps": 0}, "'euler' at t = 0.5: substeps: got 0, expected a whole number"),
        ("exact", {"substeps": True}, "'substeps' must be a whole number, got true or false: True"),
        ("euler", {"substeps": 2.5}, "'substeps' must be a whole number, got a number: 2.5"),
        (
            "by_level",
            {"midpoint_above": 0.5},
            "midpoint_above <= third_order_above, got 0.5 and 0.4",
        ),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.methods(name, options, {3: 0.5})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            (0.5, None),
            r"'own' at t = 0.5: it returned \(0.5, None\), expected a sfgrpo.solvers.Met",
        ),
        (Method(0.6), "first = 0.6, expected 0 < first <= t"),
        (Method(0.0), "first = 0.0, expected 0 < first <= t"),
    ],
)
def test_a_solver_that_returns_no_method_is_named(
    returned: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVER.registered, "own", lambda t: returned)
    with pytest.raises(ValueError, match=message):
        solvers.methods("own", {}, {0: 0.5})


def test_a_recipe_from_before_there_were_solvers_means_euler() -> None:
    with pytest.warns(UserWarning, match=r"estimate_substeps is read as 'solver: euler' and 'solv"):
        found = Credit.model_validate({"rule": "stepwise", "estimate_substeps": 3})
    assert (found.solver, found.solver_options) == ("euler", {"substeps": 3})
    with pytest.raises(ValueError, match="remove it, since a solver is named"):
        Credit.model_validate({"estimate_substeps": 3, "solver": "midpoint"})
