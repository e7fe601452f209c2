"""What launchers leave in the environment: read by the engine, which imports DeepSpeed, and by the
doctor, which does without."""

from __future__ import annotations

import os

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")


def misread() -> list[str]:
    """Which variables should be numbers and are not, one message each; an empty one is unset."""
    return [
        f"the environment sets {name} to '{value}', not a number"
        for name in NUMBERS
        if (value := os.environ.get(name)) and not value.isdecimal()
    ]
