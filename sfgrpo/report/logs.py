"""What a report reads of a run's folder, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sfgrpo.run import records

NEEDED = {"metrics": ("iteration", "reward"), "eval": ("iteration", "reward")}
"""What each row of a log must hold."""


def rows(folder: Path, log: str) -> list[dict[str, Any]]:
    """The lines of `metrics` or `eval`, at least one.

    Raises:
        ValueError: the folder is no run's, or has not come so far, or the file is something else.
    """
    path = folder / f"{log}.jsonl"
    if not folder.is_dir():
        raise ValueError(f"'{folder}' holds no run: there is no such folder")
    try:
        found = records.read(path)
    except ValueError as error:
        raise ValueError(f"'{folder}' holds no run: {path.name}: {error}") from error
    if not found:
        raise ValueError(f"'{folder}' holds no run: {path.name} needs a line")
    for row in found:
        for name in NEEDED[log]:
            if not isinstance(row, dict) or not isinstance(row.get(name), int | float):
                raise ValueError(
                    f"'{folder}' holds no run: {path.name} has a line without the number '{name}'"
                )
    return found


def recipe(folder: Path) -> tuple[str, str]:
    """The text of a run's recipe, and its credit rule.

    Raises:
        ValueError: there is no recipe, or it is something else.
    """
    path = folder / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        rule = yaml.safe_load(text)["credit"]["rule"]
    except FileNotFoundError:
        raise ValueError(f"'{folder}' holds no run: there is no recipe.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError) as error:
        raise ValueError(
            f"'{path}' is no recipe of a run: {' '.join(str(error).split())}"
        ) from error
    return text, str(rule)


def parsed(folder: Path) -> dict[str, Any]:
    """The keys of a run's recipe.

    Raises:
        ValueError: as `recipe`.
    """
    return yaml.safe_load(recipe(folder)[0])
