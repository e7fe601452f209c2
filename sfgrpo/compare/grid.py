"""The grid file: which recipes, with which keys changed, over which seeds; `EXAMPLE` is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from sfgrpo import config
from sfgrpo.config import Recipe, RecipeError
from sfgrpo.names import unknown_name
from sfgrpo.recipe_text import explain, read_file
from sfgrpo.sections import Count, Folder, Section, Source

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*(-[A-Za-z0-9_.+]+)*")
"""Names of variants: they become names of folders."""
MOST_SEEDS = 20
"""The exact test over so many pairs has a million sign patterns."""
OURS = {"run": "give its keys one by one", "run.seed": "stands in seeds",
        "run.output_dir": "follows from output_dir"}  # fmt: skip
"""Keys of a recipe that no variant may set, and why."""
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Grid(Section):
    """Variants x seeds, and what they are measured against."""

    recipe: Source
    """Name of a recipe, or a .yaml file: what every variant starts from."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MOST_SEEDS)]
    """Each variant is run with each; equal seeds of two variants are a pair."""
    at_once: Count = 1
    """Runs at a time; they share the cores. Seconds are those of a machine that is so shared."""
    base: dict[str, Any] = Field(default={})
    """Dotted key -> value, for every run."""
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name -> dotted key -> value, over `base`; the key `recipe` is a recipe of its own."""
    reference: str | None = None
    """The variant that others are paired with; null is the first."""
    metric: str = "reward"
    """The number of evaluations whose way to `reach` is measured."""
    reach: float | None = None
    """R; null is the median over seeds of what the reference's last evaluation has."""
    output_dir: Folder
    """Runs go to VARIANT-SEED in it; table, summary and figures beside them."""

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice")
        return seeds

    @field_validator("base", "variants", mode="after")
    @classmethod
    def _not_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given.keys() & OURS.keys():
            raise ValueError(f"{key}: {OURS[key]}")
        return given

    @field_validator("variants")
    @classmethod
    def _folders(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, keys in variants.items():
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"'{name}' names a folder: letters, digits, '_', '.', '+', and '-' between them"
                )
            for key in keys.keys() & OURS.keys():
                raise ValueError(f"{name}: {key}: {OURS[key]}")
        return variants

    @model_validator(mode="after")
    def _known(self) -> Grid:
        if self.reference is not None and self.reference not in self.variants:
            text = unknown_name("variant", self.reference, self.variants)
            raise ValueError(f"reference: {text}")
        return self

    @property
    def compared(self) -> str:
        """The variant that others are paired with."""
        return self.reference or next(iter(self.variants))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Seed by seed, so that pairs are there early.

        Raises:
            RecipeError: in one line, which names the variant and its wrong keys.
        """
        return tuple(self._runs())

    def _runs(self) -> Iterator[Run]:
        for seed in self.seeds:
            for name, keys in self.variants.items():
                values = {**self.base, **keys}
                recipe = values.pop("recipe", self.recipe)
                values["run.seed"] = seed
                values["run.output_dir"] = str(self.output_dir / f"{name}-{seed}")
                if not isinstance(recipe, str):
                    raise RecipeError(f"variants.{name}: recipe: expected text, got {recipe!r}")
                try:
                    yield Run(name, seed, config.load(recipe, values=values))
                except RecipeError as error:
                    raise RecipeError(f"variants.{name}: {_in_one_line(error)}") from None


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a grid."""

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.variant}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.recipe.run.output_dir

    @property
    def iterations(self) -> int:
        """As many as it is to have."""
        return self.recipe.run.iterations


def read(path: Path) -> Grid:
    """Read and validate a grid and the recipes of all its runs.

    Raises:
        RecipeError: in one line, which names the file and the wrong keys.
    """
    data = read_file(path, "grid")
    try:
        grid = Grid.model_validate(data)
    except ValidationError as error:
        told = RecipeError(explain(error, Grid, "grid"))
        raise RecipeError(f"'{path}': {_in_one_line(told)}") from None
    try:
        assert grid.runs
    except RecipeError as error:
        raise RecipeError(f"'{path}': {error}") from None
    return grid


def _in_one_line(error: RecipeError) -> str:
    first, *others = str(error).splitlines()
    return " ".join([first, "; ".join(line.strip() for line in others)]).strip()
