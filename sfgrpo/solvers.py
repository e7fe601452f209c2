"""Solvers: how a state at noise level t is carried on to t = 0, for its clean estimate.

The clean estimate of a state is the end of the ODE dx/dt = v(x, t) that starts there. Its first
velocity v1 is the sampler's own, and the kernel of the sampler's step follows it over a length
`Method.first` in the same pass, so that a solver keeps one latent, `x - first v1`, in place of v1.
What is left is a generator that yields a latent and its noise level wherever it needs a velocity:
many of them share the batches of the network (`sfgrpo.estimates`).

To add a solver, write one such function of t: here, decorated with `@solver("name")`, or in a file
of your own, which a recipe names "module:function". What it takes beside t are its options
(`credit.solver_options`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sfgrpo.names import SOLVER, blaming_own

if TYPE_CHECKING:  # a recipe names solvers without PyTorch
    from torch import Tensor

Stages = Generator[tuple["Tensor", float], "Tensor", "Tensor"]
"""Yields `(latents [B, ...], noise level)`, is sent their velocity `[B, ...]`, and returns the
clean estimate `[B, ...]`. What it is given is its own to overwrite. How often it yields must not
depend on the latents, since ranks with other latents wait for it."""


class Method(NamedTuple):
    """What a solver does with states at one noise level."""

    first: float
    """The length over which the sampler's own velocity v1 is followed."""
    rest: Callable[[Tensor, Tensor], Stages] | None = None
    """What follows, of the state `x [B, ...]` and `x - first v1`; None if that is the estimate."""


class SolverError(ValueError):
    """A solver of the user's own failed, or gave what is no method or no latents of its states."""


Solver = Callable[..., Method]
"""`(t, **options) -> Method`."""


def solver(name: str) -> Callable[[Solver], Solver]:
    """Let `name` mean the decorated solver in this process."""

    def register(function: Solver) -> Solver:
        SOLVER.register(name, function)
        return function

    return register


def methods(
    name: str, options: Mapping[str, Any] | None, levels: Mapping[int, float]
) -> dict[int, Method]:
    """What a solver does with each state, from the states' noise levels.

    Raises:
        ValueError: unknown solver or option (with the nearest name).
        SolverError: the solver failed or returned what is no method (naming the level). What is
            left of one of the user's own raises it, too, later.
    """
    function = SOLVER.bind(name, options)
    found = {}
    for state, t in levels.items():
        try:
            with blaming_own(name, SolverError, "it failed"):
                method = function(t)
            found[state] = _checked(method, t)
        except ValueError as error:
            raise SolverError(f"solver '{name}' at t = {t:.4g}: {error}") from error
        if method.rest is not None and ":" in name:
            found[state] = method._replace(rest=_told(name, method.rest))
    return found


def _told(name: str, rest: Callable[[Tensor, Tensor], Stages]) -> Callable[..., Stages]:
    """The user's own `rest`, whose errors are told in one line with their place."""

    def stages(x: Tensor, p: Tensor) -> Stages:
        with blaming_own(name, SolverError, f"solver '{name}' failed"):
            made = rest(x, p)
            if not isinstance(made, Generator):
                raise SolverError(
                    f"solver '{name}': Method.rest returned a {type(made).__name__}, expected a "
                    "generator: `velocity = yield latents, t`, and the estimate by `return`"
                )
            return (yield from made)

    return stages


def _checked(method: Method, t: float) -> Method:
    if not isinstance(method, Method):
        raise ValueError(f"it returned {method!r}, expected a sfgrpo.solvers.Method")
    if not 0 < method.first <= t:
        raise ValueError(f"first = {method.first}, expected 0 < first <= t")
    return method


def _along(x: Tensor, v: Tensor, length: float) -> Tensor:
    """`x - length v`: further down the path, where v leads."""
    from sfgrpo import ops

    return ops.tweedie(x, v, length)


def _at_least_one(substeps: int) -> int:
    if not isinstance(substeps, int) or isinstance(substeps, bool) or substeps < 1:
        raise ValueError(f"substeps: got {substeps!r}, expected a whole number from 1 on")
    return substeps


@solver("tweedie")
def tweedie(t: float) -> Method:
    """The posterior mean E[x_0 | x_t] = x - t v1 (Tweedie's formula); no further evaluation."""
    return Method(first=t)


@solver("euler")
def euler(t: float, *, substeps: int = 5) -> Method:
    """Euler in equal substeps, of which the sampler's velocity is the first: order 1.

    Stepwise-Flow-GRPO (Savani et al. 2026, arXiv 2603.28718) estimates so, with T' = 5 substeps.
    """
    length = t / _at_least_one(substeps)

    def rest(x: Tensor, p: Tensor) -> Stages:
        for k in range(1, substeps):
            p = _along(p, (yield p, t - k * length), length)
        return p

    return Method(length, rest if substeps > 1 else None)


@solver("midpoint")
def midpoint(t: float) -> Method:
    """The explicit midpoint rule in one step: order 2, one further evaluation.

        v2 = v(x - t/2 v1, t/2),   x0 = x - t v2

    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I (1993), table II.1.1.
    """

    def rest(x: Tensor, p: Tensor) -> Stages:
        return _along(x, (yield p, t / 2), t)

    return Method(t / 2, rest)


@solver("third_order")
def third_order(t: float, *, substeps: int = 1) -> Method:
    """Heun's method of order 3 in equal steps; two further evaluations for one step.

        v2 = v(x - h/3 v1, t - h/3),   v3 = v(x - 2h/3 v2, t - 2h/3),   x - h (v1/4 + 3/4 v3)

    Hairer, Norsett, Wanner, table II.1.1. No stage stands at t = 0, where a network that predicts
    velocities need not know anything.
    """
    h = t / _at_least_one(substeps)

    def rest(x: Tensor, p: Tensor) -> Stages:
        for k in range(substeps):
            now = t - k * h
            if k:
                p = _along(x, (yield x, now), h / 3)
            v2 = yield p, now - h / 3
            v3 = yield _along(x, v2, 2 / 3 * h), now - 2 / 3 * h
            x = _along(x.lerp(p, 0.75), v3, 0.75 * h)  # x - h/4 v1 = x/4 + 3/4 p
        return x

    return Method(h / 3, rest)


@solver("exact")
def exact(t: float, *, substeps: int = 16) -> Method:
    """`third_order` in so many steps that what is left of its error, 1 / substeps^3 of one step's,
    is rounding: what other solvers are measured by, at 3 substeps - 1 further evaluations."""
    return third_order(t, substeps=substeps)


@solver("by_level")
def by_level(t: float, *, third_order_above: float = 0.4, midpoint_above: float = 0.15) -> Method:
    """The cheapest solver whose error does not show in the reward at this noise level.

    The path bends most where the noise is high; near t = 0 the Tweedie projection is the image. So
    it is with image models. Where training itself bends paths, as it does those of small policies,
    this solver is left behind, and `euler` is not (benchmarks/results/claims.md): a run warns of it
    (`sfgrpo.run.alarms.estimates`), and `sfgrpo probe RUN` measures it.
    """
    if not 0 <= midpoint_above <= third_order_above:
        raise ValueError(
            "expected 0 <= midpoint_above <= third_order_above, got "
            f"{midpoint_above} and {third_order_above}"
        )
    if t > third_order_above:
        return third_order(t)
    return midpoint(t) if t > midpoint_above else tweedie(t)
