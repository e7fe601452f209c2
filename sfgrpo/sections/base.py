"""What all sections share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from sfgrpo.recipe_text import refuse_mistaken


class Section(BaseModel):
    """A frozen group of keys; unknown ones are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_mistaken(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def _large_enough(sides: int | tuple[int, int]) -> int | tuple[int, int]:
    if min(both_sides(sides)) < 8:
        raise ValueError("sides must be at least 8 pixels")
    return sides


def both_sides(given: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what a recipe says."""
    return (given, given) if isinstance(given, int) else given


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


def _folder(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"expected a folder, got {value!r}; the current one is '.'")
    return _home(value)


Source = Annotated[str, BeforeValidator(_home)]
"""Text that may be a path: ~ is the home folder."""
Folder = Annotated[Path, BeforeValidator(_folder)]
"""A path that names a folder; an empty one would be the current folder, which nobody asked for."""
Count = Annotated[int, Field(ge=1, lt=2**31)]
Pixels = Annotated[int | tuple[int, int], AfterValidator(_large_enough)]
"""The side of a square, or [height, width]."""
Index = Annotated[int, Field(ge=0, lt=2**31)]
Decay = Annotated[float, Field(ge=0, lt=1)]
