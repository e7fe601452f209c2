"""Ranks of a run want the same, before anything is trained: recipe, prompts, options.

Ranks that were started by hand or on several machines may read another file or get another option.
Another learning rate or seed would train in silence, another stage or `checkpoint.every` hang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sfgrpo import __version__, engine
from sfgrpo.config import Recipe
from sfgrpo.prompts import Split, digest
from sfgrpo.run.peers import Agreed
from sfgrpo.run.records import RunError

OWN = {"run.output_dir"}
"""Keys that may differ: what it names must be one folder, which `sfgrpo.run.claim` checks."""
NAMED = 5
"""How many differences are told."""


class Refused(RunError, Agreed):
    """Every rank refuses the run, at the same point."""


def check(recipe: Recipe, **options: object) -> None:
    """Compare the recipe and the command's options over ranks (a collective).

    Raises:
        Refused: they differ; names the keys, on every rank.
    """
    keys = {key: v for key, v in _flat(recipe.model_dump(mode="json")) if key not in OWN}
    options = {f"--{name}": value for name, value in options.items()}
    compare({**keys, **options, "the version of sfgrpo": __version__})


def check_prompts(found: Split) -> None:
    """Compare what the prompt files hold, which may differ under one name (a collective).

    Raises:
        Refused: they differ, on every rank.
    """
    if engine.world() > 1:
        sides = {"training": found.train, "evaluation": found.evaluation}
        compare({
            f"the prompts for {side}": f"{len(prompts)} with hash {digest(prompts)[:12]}"
            for side, prompts in sides.items()
        })  # fmt: skip


def compare(mine: Mapping[str, object]) -> None:
    """Refuse ranks that differ in any value; absent is a value, too (a collective)."""
    ranks = engine.exchange(dict(mine))
    keys = sorted(set().union(*ranks))
    differences = [told for key in keys if (told := _difference(key, ranks))]
    if differences:
        more = len(differences) - NAMED
        raise Refused(
            "ranks were started differently: " + "; ".join(differences[:NAMED])
            + (f"; and {more} more" if more > 0 else "")
            + ". Give every rank the same recipe, files and options"
        )  # fmt: skip


def _difference(key: str, ranks: list[dict[str, object]]) -> str | None:
    """What is said of the first rank whose value is not rank 0's."""
    said = [repr(values[key]) if key in values else "none" for values in ranks]
    other = next((rank for rank, value in enumerate(said) if value != said[0]), None)
    return None if other is None else f"rank {other} has {key} {said[other]}, rank 0 has {said[0]}"


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}".strip("."))
    else:
        yield place, value
