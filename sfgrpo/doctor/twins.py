"""What an iteration takes, for a recipe and for its twin: uniform credit, all else equal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sfgrpo import cost
from sfgrpo.config import Recipe

Counts = dict[str, int]
"""By kind, as in metrics.jsonl (`sfgrpo.tally`)."""
SHOWN = 50
"""Iterations whose mean is told where a window moves."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The counts of all ranks together, and what they weigh beside each other."""

    recipe: Counts
    uniform: Counts
    row_flops: int
    """Of one network row without gradient."""
    decode_flops: int
    """Of one sample."""
    gradient: int
    """What a row with gradient costs, in rows without: the backward pass takes two forwards (with
    LoRA somewhat less, since frozen weights need no gradient of their own), and with gradient
    checkpointing the forward is computed twice."""

    @property
    def decode(self) -> float:
        """What decoding one sample costs, in network rows."""
        return self.decode_flops / self.row_flops

    def rows(self, counts: Counts) -> float:
        """Everything in network rows without gradient; rewards, of which nothing is known, are
        not in it."""
        computed = counts["velocity"] + self.gradient * counts["gradient"]
        return computed + self.decode * counts["decoded"]

    @property
    def ratio(self) -> float:
        """The recipe's cost, in its twin's."""
        return self.rows(self.recipe) / self.rows(self.uniform)

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        in_rows = {name: round(self.rows(getattr(self, name)), 1) for name in ("recipe", "uniform")}
        return {**asdict(self), "in_rows": in_rows, "ratio": round(self.ratio, 4)}


def twin(recipe: Recipe) -> Recipe:
    """The same recipe with uniform credit, which takes no options of another rule."""
    credit = recipe.credit.model_copy(update={"rule": "uniform", "options": {}})
    return recipe.model_copy(update={"credit": credit})


def compare(recipe: Recipe, sigmas: Tensor, world: int, flops: tuple[int, int]) -> Cost:
    """Both costs, over the schedule `sigmas [T + 1]`.

    Args:
        flops: of one network row and of decoding one sample (`footprint.flops`).

    Raises:
        ValueError: as `cost.expected`.
    """
    row, decode = flops
    return Cost(
        recipe=_mean(recipe, sigmas, world), uniform=_mean(twin(recipe), sigmas, world),
        row_flops=row, decode_flops=decode,
        gradient=4 if recipe.train.gradient_checkpointing else 3,
    )  # fmt: skip


def _mean(recipe: Recipe, sigmas: Tensor, world: int) -> Counts:
    """Over iterations spread evenly; without a window all are alike."""
    last = recipe.run.iterations if recipe.sample.window else 1
    shown = range(0, last, -(-last // SHOWN))
    found = [cost.expected(recipe, sigmas, world=world, iteration=k).counts() for k in shown]
    return {kind: round(sum(row[kind] for row in found) / len(found)) for kind in found[0]}
