"""Whether what the rewards of a recipe load is here, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from sfgrpo.config import Recipe
from sfgrpo.doctor.machine import Problem
from sfgrpo.doctor.text import size
from sfgrpo.rewards import _sizes, _weights


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Bytes of the networks of a rank's rewards, without what their forwards take."""

    device: int = 0
    host: int = 0
    """In main memory, where their option `device` says "cpu"."""
    passing: int = 0
    """The largest of those that pass main memory on their way to the device."""
    unknown: tuple[str, ...] = ()
    """Rewards, and why nothing, or not all, is known of them."""

    def told(self) -> str:
        """For people."""
        places = {"on the device": self.device, "in main memory": self.host}
        parts = [f"{size(taken)} {where}" for where, taken in places.items() if taken]
        if self.unknown:
            parts.append(f"not counted: {', '.join(self.unknown)}")
        return "; ".join(parts) or "no networks"


def taken(recipe: Recipe) -> Taken:
    """What the rewards take, by the files that are here; nothing is loaded."""
    device, host, passing, unknown = 0, 0, 0, []
    for name in recipe.reward:
        if ":" in name:
            unknown.append(f"{name} (one's own)")
            continue
        try:
            found = _sizes.size(name, recipe.reward_options.get(name, {}))
        except ValueError as error:
            unknown.append(f"{name} ({error})")
            continue
        unknown += [f"{name} ('{source}' is not here)" for source in found.absent]
        if found.device == "cpu":
            host += found.bytes
        else:
            device, passing = device + found.bytes, max(passing, found.bytes)
    return Taken(device=device, host=host, passing=passing, unknown=tuple(unknown))


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
