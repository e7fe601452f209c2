"""Recipes as text: what YAML and the command line mean, and errors in the words of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sfgrpo.names import unknown_name


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names each wrong key."""


def override(data: dict[str, Any], key: str, value: str) -> None:
    """Set `section.key` from the command line; the value is read as YAML."""
    *sections, last = key.split(".")
    for section in sections:
        child = data[section] = {} if data.get(section) is None else data[section]
        if not isinstance(child, dict):
            raise RecipeError(f"--{key}: '{section}' is not a section")
        data = child
    data[last] = numbers(yaml.safe_load(value))


def numbers(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 (no dot) as text; a recipe means the number."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """A line per wrong key, with the nearest valid name."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            message = unknown_name(
                "key", str(problem["loc"][-1]), _siblings(problem["loc"], recipe)
            )
        elif problem["type"] == "literal_error":
            names = (
                problem.get("ctx", {})["expected"]
                .replace(" or ", ", ")
                .replace("'", "")
                .split(", ")
            )
            message = unknown_name("value", str(problem["input"]), names)
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message += f" (got {problem['input']!r})"
        lines.append(f"  {place}: {message}")
    return "the recipe cannot be run:\n" + "\n".join(lines)


def _siblings(place: Sequence[int | str], recipe: type[BaseModel]) -> list[str]:
    """The keys that would have been right there."""
    section: Any = recipe
    for name in place[:-1]:
        annotation = section.model_fields[str(name)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
