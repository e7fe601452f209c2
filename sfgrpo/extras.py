"""What to install if a module is missing: the extra of this package that brings it.

With `pip install .` alone there is PyTorch, which the ops need, and nothing else.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

MODULES = {
    "train": (
        "accelerate", "datasets", "deepspeed", "diffusers", "einops", "matplotlib", "numpy",
        "peft", "PIL", "psutil", "pydantic", "yaml", "safetensors", "tensorboard", "tqdm",
        "transformers",
    ),
    "demo": ("onnxruntime", "rapidocr", "sklearn"),
    "serve": ("fastapi", "numpy", "PIL", "safetensors", "uvicorn"),
    "http": ("httpx2",),
    "track": ("swanlab", "trackio", "wandb"),
    "video": ("ftfy",),
}  # fmt: skip
"""Modules of the extras' distributions, in the order of pyproject.toml. Not read from there or from
the metadata of an installation: those name distributions (pyyaml), an error names a module (yaml).
"""
INTERRUPTED = 128 + signal.SIGINT
Arguments = ParamSpec("Arguments")


def needed(error: BaseException | None) -> str | None:
    """What to install if `error`, or what caused it, is that a module of an extra is missing; None
    for anything else, such as a missing module of the user's own."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            module = (error.name or "").partition(".")[0]
            if module in MODULES["train"]:
                return 'pip install ".[train]", or ".[demo]" for the embedded model'
            for extra in ("demo", "serve", "http", "track", "video"):
                if module in MODULES[extra]:
                    return f'pip install ".[{extra}]"'
        error = error.__cause__
    return None


def explained(error: Exception) -> str:
    """The error's message, and what to install if that is what it takes."""
    advice = needed(error)
    return f"{error}; {advice}" if advice else str(error)


def told(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """`main`, which says in one line, with exit status 2, what to install for a missing module, and
    that it was interrupted, with the shells' status, where nothing is left to be saved."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> int:
        try:
            return main(*args, **options)
        except ModuleNotFoundError as error:
            if needed(error) is None:
                raise
            print(f"sfgrpo: {explained(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nsfgrpo: interrupted", file=sys.stderr)
            return INTERRUPTED

    return run
