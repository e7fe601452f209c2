"""Whether what the rewards of a recipe load is here."""

from __future__ import annotations

from sfgrpo.config import Recipe
from sfgrpo.doctor.machine import Problem
from sfgrpo.rewards import _weights


def problems(recipe: Recipe) -> list[Problem]:
    """What a reward needs and cannot have; nothing is loaded.

    What a download could bring is a note: a recipe is also examined where it will not run. Rewards
    of the user's own are passed over, since their code would have to be run.
    """
    found: list[Problem] = []
    for name in (name for name in recipe.reward if ":" not in name):
        try:
            absent = _weights.missing(name, recipe.reward_options.get(name, {}))
        except ValueError as error:
            remedy = 'pip install ".[demo]", or correct the recipe'
            found.append(Problem(what=str(error), remedy=remedy, fatal=True))
            continue
        for it in absent:
            where = f"reward_options.{name}.{it.option}"
            remedy = f"hf download {_words(it.source)}" if it.downloadable else f"correct {where}"
            what = f"{where}: '{it.source}' {it.wrong}"
            found.append(Problem(what=what, remedy=remedy, fatal=not it.downloadable))
    return found


def _words(source: str) -> str:
    """The arguments of `hf download`: the repository, and the file if only that is needed."""
    repository, file = _weights.split(source)
    return f"{repository} {file}".rstrip()
