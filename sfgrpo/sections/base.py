"""What all sections share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

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


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


Source = Annotated[str, BeforeValidator(_home)]
"""Text that may be a path: ~ is the home folder."""
Folder = Annotated[Path, BeforeValidator(_home)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Decay = Annotated[float, Field(ge=0, lt=1)]
