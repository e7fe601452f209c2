"""Functions of the user's own that fail are told in one line, with the file and line of theirs."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import pytest
import torch

from sfgrpo import backbones, rewards, sde, solvers
from sfgrpo.names import OwnError
from sfgrpo.sde import Step
from sfgrpo.solvers import Method, SolverError
from tests.support.rollouts import field, finished, run

HERE = rf".*{__name__.rpartition('.')[2]}\.py, line \d+: "


def unknown_field(step: Any) -> tuple[float, float, float]:
    return 1.0, step.sigma, 0.0


def no_root(step: Step) -> tuple[float, float, float]:
    return 1.0, step.s - step.t, math.sqrt(step.s - 2)


def much_noise(step: Step) -> tuple[float, float, float]:
    return 1.0, step.s - step.t, math.sqrt(0.25 - step.eta)


def words(step: Step) -> tuple[str, float, float]:
    return "1", step.s - step.t, 0.0


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (unknown_field, rf"at step 0 \(1 -> 0.5\): it failed: {HERE}AttributeError: 'Step' object"),
        (no_root, f"at step 0 .*it failed: {HERE}ValueError: "),
        (
            much_noise,
            f"eta: 0.7 is too large .*{HERE}ValueError: .*; the largest that fits is 0.25",
        ),
        (words, r"it returned \('1', .*, expected the three numbers"),
    ],
)
def test_a_sampler(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde.coefficients([1.0, 0.5, 0.0], f"{__name__}:{own.__name__}")


def test_a_sampler_may_return_tensors() -> None:
    table = sde.coefficients([1.0, 0.5, 0.0], f"{__name__}:of_tensors")
    assert table[:, 0].tolist() == [1.0, 1.0]


def of_tensors(step: Step) -> tuple[torch.Tensor, float, int]:
    return torch.ones(()), step.s - step.t, 0


def at_once(t: Any) -> Method:
    return Method(first=t.x)


def after_a_velocity(t: float) -> Method:
    def rest(x: Any, p: Any) -> solvers.Stages:
        v: Any = yield p, t / 2
        return x - t * v.unknown

    return Method(t / 2, rest)


def no_generator(t: float) -> Method:
    def rest(x: Any, p: Any) -> Any:
        return x

    return Method(t / 2, rest)


def no_level(t: float) -> Method:
    def rest(x: Any, p: Any) -> Any:
        yield p
        return x

    return Method(t / 2, rest)


def no_estimate(t: float) -> Method:
    def rest(x: Any, p: Any) -> Any:
        yield p, t / 2

    return Method(t / 2, rest)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (at_once, f":at_once' at t = .*: it failed: {HERE}AttributeError: "),
        (after_a_velocity, f":after_a_velocity' failed: {HERE}AttributeError: "),
        (no_generator, ":no_generator': Method.rest returned a Tensor, expected a generator"),
        (no_level, r"a solver yielded a Tensor, expected \(latents, noise level\)"),
        (no_estimate, "a solver returned a NoneType, expected latents"),
    ],
)
def test_a_solver(own: Any, message: str) -> None:
    velocity = field()
    with pytest.raises(SolverError, match=message):
        finished(velocity, run(velocity, states=(3,), solver=f"{__name__}:{own.__name__}"))


def fails(*given: Any, **settings: Any) -> NoReturn:
    raise KeyError("weights")


def test_what_loads_a_reward_or_a_network() -> None:
    name = f"{__name__}:fails"
    with pytest.raises(OwnError, match=f"reward '{name}' failed: {HERE}KeyError: 'weights'"):
        rewards.build(name)
    with pytest.raises(OwnError, match=f"model.backbone '{name}' failed: {HERE}KeyError: 'wei"):
        backbones.load(name, "folder")
