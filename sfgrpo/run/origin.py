"""Where a run was started: what its recipe names by relative paths is meant from there.

A run that goes on from another folder, or is measured from one, would miss the files of its recipe
or find others of the same names. So the folder is kept beside the recipe, and whatever the recipe
names there must be the same here: prompts, models and adapters, files among options, and modules of
the user's own. A run that was copied to where that folder is not has nothing to be compared with.
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfgrpo import engine, files
from sfgrpo.config import Recipe
from sfgrpo.names import OWN, shortened
from sfgrpo.prompts import BUILTIN
from sfgrpo.run import records
from sfgrpo.run.records import STARTED_IN
from sfgrpo.sections import Folder, Source

MARKS = {mark for kind in (Source, Folder) for mark in typing.get_args(kind)[1:]}
"""What tells a key that may be a path from other text."""
LISTED = 3


def keep(run: Path) -> None:
    """Keep the current folder as the one where the run was started, or went on."""
    # JSON also writes names that are not UTF-8.
    files.write(run / STARTED_IN, json.dumps(os.getcwd()) + "\n")


def check_continued(recipe: Recipe) -> None:
    """`check` for the command that trains, on rank 0: where it goes on with a run that began.

    Raises:
        ValueError: as `check`.
    """
    run = recipe.run.output_dir
    if engine.rank() == 0 and records.begun(run):
        check(run, recipe)


def check(run: Path, recipe: Recipe, *, given: Collection[str] = ()) -> None:
    """Whether the recipe of a run means the same here as where the run was started.

    Args:
        given: keys of which the command says what they are: those are meant from here.

    Raises:
        ValueError: it does not; names the keys and both folders.
    """
    try:
        origin = Path(json.loads((run / STARTED_IN).read_text(encoding="utf-8")))
    except FileNotFoundError:  # of an earlier version
        return
    here = Path.cwd()
    if not origin.is_dir() or origin.samefile(here):
        return
    other = [
        f"{key} '{shortened(said)}'"
        for key, said, name in _named(recipe)
        if not any(f"{key}.".startswith(f"{k}.") for k in given) and _differs(name, origin, here)
    ]
    if other:
        told = ", ".join(other[:LISTED]) + (", ..." if other[LISTED:] else "")
        raise ValueError(
            f"'{run}' was started in '{origin}', and {told} in its recipe is not the same from "
            f"'{here}': give the command in '{origin}'"
        )


def _named(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(key, what it says, the relative path that may be) of what is no path or name of ours."""
    for key, said, is_path in _texts(recipe):
        module = said.partition("/")[0]
        if OWN.fullmatch(module):
            yield key, said, f"{module.partition('.')[0].partition(':')[0]}:"
        elif is_path and key != "run.output_dir" and said and said not in BUILTIN:
            yield key, said, said


def _texts(section: BaseModel, place: str = "") -> Iterator[tuple[str, str, bool]]:
    """(key, text, whether it may be a path) of all texts of a recipe."""
    for name, field in type(section).model_fields.items():
        key, value = f"{place}{name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _texts(value, f"{key}.")
        else:
            is_path = _may_be_path(field) or name.endswith("options")
            value = tuple(value) if key == "reward" else value  # its weights tell nothing
            yield from ((inner, text, is_path) for inner, text in _inner(key, value))


def _inner(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _inner(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inner(key, inner)
    elif isinstance(value, str | Path):
        yield key, str(value)


def _may_be_path(field: FieldInfo) -> bool:
    options = typing.get_args(field.annotation)
    marks = [*field.metadata, *(m for option in options for m in typing.get_args(option)[1:])]
    return any(mark in MARKS for mark in marks)


def _differs(name: str, origin: Path, here: Path) -> bool:
    """Whether a relative path, or a module (`name:`), is not the same from both folders."""
    if not name.endswith(":"):
        return _other(origin / name, here / name)
    module = name[:-1]
    spec = importlib.util.find_spec(module)
    places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    if places and not any(Path(place).is_relative_to(here) for place in places):
        return False  # installed, which comes before either folder
    return any(_other(origin / form, here / form) for form in (module, f"{module}.py"))


def _other(there: Path, here: Path) -> bool:
    """Whether only one of them exists, or both do and differ; a copied file is the same, of a
    folder only the folder itself."""
    if there.exists() != here.exists():
        return True
    if not there.exists() or there.samefile(here):
        return False
    return not (there.is_file() and here.is_file() and filecmp.cmp(there, here, shallow=False))
