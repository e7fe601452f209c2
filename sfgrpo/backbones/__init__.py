"""Generators by name: `load("sd3", path)` calls `sfgrpo.backbones.sd3.load(path)`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from sfgrpo.backbones.base import Backbone, Conditioning
from sfgrpo.names import unknown_name

__all__ = ["Backbone", "Conditioning", "available", "load"]


def available() -> list[str]:
    """Names of the backbones in this package, one per module."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load(name: str, path: str | Path, **options: Any) -> Backbone:
    """Load the weights at `path` (a folder, a Hub id, or "embedded") with the backbone `name`.

    `options` are those of the backbone's own `load`. ValueError for an unknown name.
    """
    if name not in available():
        raise ValueError(unknown_name("backbone", name, available()))
    return importlib.import_module(f"{__name__}.{name}").load(path, **options)
