"""Recipes as text: what a file and the command line say, and errors in the words of the file."""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from sfgrpo import recipe_yaml
from sfgrpo.names import shortened, unknown_name
from sfgrpo.recipe_yaml import RecipeYAMLError


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names each wrong key."""


def read_file(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The sections of a recipe file, or of another such file that messages call `what`.

    Raises:
        RecipeError: names the file, and the line where there is one.
    """
    try:
        data = recipe_yaml.read(path.read_text(encoding="utf-8-sig"))
    except RecipeYAMLError as error:
        raise RecipeError(f"{what} '{path}' is not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{what} '{path}' is not UTF-8 text: byte {error.object[error.start]:#04x} at position "
            f"{error.start}"
        ) from None
    except OSError as error:
        raise RecipeError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(
            f"{what} '{path}' must be a mapping of sections, got {type(data).__name__}"
        )
    return data


def override(data: dict[str, Any], key: str, value: str, recipe: type[BaseModel]) -> None:
    """Set `section.key` from the command line.

    The value is read as YAML, but where the key is a text, a folder or a file, it is that as it
    stands: '#', ':', '@' and brackets mean nothing there, and null is null only if the key may be.

    Raises:
        RecipeError: names the key.
    """
    kinds = _kinds(annotation_of(key.split("."), recipe))
    try:
        if kinds and kinds <= {str, Path, types.NoneType}:
            put(data, key, _text(value, nullable=types.NoneType in kinds))
        else:
            put(data, key, recipe_yaml.read(value))
    except RecipeYAMLError as error:
        raise RecipeError(f"--{key}: '{shortened(value)}' is not valid YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"--{error}") from None


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` to what was read already.

    Raises:
        RecipeError: names the key.
    """
    *sections, last = key.split(".")
    inner = data
    for section in sections:
        child = inner[section] = {} if inner.get(section) is None else inner[section]
        if not isinstance(child, dict):
            raise RecipeError(f"{key}: '{section}' is not a section")
        inner = child
    inner[last] = value


def _text(value: str, *, nullable: bool) -> str | None:
    if nullable and value in ("null", "~", ""):
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        try:
            inner = recipe_yaml.read(value)
        except RecipeYAMLError:
            return value
        return inner if isinstance(inner, str) else value
    return value


def annotation_of(place: Sequence[int | str], recipe: type[BaseModel]) -> Any:
    """The type of a key of the recipe; None where there is no such key."""
    annotation: Any = recipe
    for name in place:
        section = _section(annotation)
        if section is None or str(name) not in section.model_fields:
            return None
        annotation = section.model_fields[str(name)].annotation
    return annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _kinds(annotation: Any) -> set[Any]:
    """The types that a key may have; empty for a section or an unknown key."""
    if annotation is None or _section(annotation) is not None:
        return set()
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for option in typing.get_args(annotation) for kind in _kinds(option)}
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin is Literal:
        return {Literal}
    return {origin or annotation}


def refuse_mistaken(value: Any, annotation: Any) -> None:
    """ValueError for a value that only looks like what the key means: `true` or "5" for a number, a
    number for a text, an integer beyond 64 bits."""
    kinds = _kinds(annotation)
    numeric = bool(kinds & {int, float})
    if isinstance(value, bool) and numeric and bool not in kinds:
        raise ValueError("expected a number")
    if isinstance(value, str) and numeric and not kinds & {str, Path, Literal, tuple}:
        raise ValueError("expected a number, without quotes or leading zeros")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise ValueError("expected a number below 2^63")
    if isinstance(value, bool | int | float) and kinds and kinds <= {str, Path, types.NoneType}:
        raise ValueError("expected text; put it in quotes")


def as_euler(credit: Any) -> Any:
    """A section `credit` with the key `estimate_substeps`, from before there were solvers, in
    today's words; any other as it is.

    Raises:
        ValueError: it names a solver as well.
    """
    if not isinstance(credit, dict) or "estimate_substeps" not in credit:
        return credit
    rest = {key: value for key, value in credit.items() if key != "estimate_substeps"}
    substeps = credit["estimate_substeps"]
    now = f"'solver: euler' and 'solver_options: {{substeps: {shortened(substeps)}}}'"
    if rest.keys() & {"solver", "solver_options"}:
        raise ValueError(f"estimate_substeps stands for {now}: remove it, since a solver is named")
    warnings.warn(f"credit.estimate_substeps is read as {now}: write those", stacklevel=2)
    return {**rest, "solver": "euler", "solver_options": {"substeps": substeps}}


def explain(error: ValidationError, recipe: type[BaseModel], what: str = "recipe") -> str:
    """A line per wrong key, with the nearest valid name."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        place, message = _place(problem["loc"], recipe), _message(problem, recipe)
        lines.setdefault(place, [])
        if message not in lines[place]:
            lines[place].append(message)
    told = [f"  {place}: {'; or '.join(found)}" for place, found in lines.items() if place]
    return f"the {what} cannot be run:\n" + "\n".join(
        [*told, *(f"  {line}" for line in lines.get("", []))]
    )


def _message(problem: Any, recipe: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        section = _section(annotation_of(problem["loc"][:-1], recipe))
        known = section.model_fields if section else ()
        return unknown_name("key", str(problem["loc"][-1]), known)
    if problem["type"] == "literal_error":
        names = problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return unknown_name("value", shortened(problem["input"]), names)
    message = problem["msg"].removeprefix("Value error, ")
    own = problem["type"] == "value_error" and not isinstance(
        problem["input"], bool | int | float | str
    )
    return message if own else f"{message} (got {shortened(problem['input'])})"


def _place(location: Sequence[int | str], recipe: type[BaseModel]) -> str:
    """The key, without what pydantic adds of the branches of a union."""
    known = 0
    while known < len(location) and annotation_of(location[: known + 1], recipe) is not None:
        known += 1
    place = [str(part) for part in location[:known]]
    rest = location[known:]
    if rest and (known == 0 or _section(annotation_of(location[:known], recipe)) is not None):
        place.append(str(rest[0]))  # an unknown key of a section
    elif rest and dict in _kinds(annotation_of(location[:known], recipe)):
        place.append(str(rest[0]))  # an entry of a mapping
    return ".".join(place)
