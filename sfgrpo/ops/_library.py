"""The ``sfgrpo`` operator namespace: where a schema meets its reference and its fake kernel.

PyTorch's dispatcher is the only switch between backends.  The plain-PyTorch reference of an op
is registered at CompositeExplicitAutograd, hence serves every device that has nothing better;
the C++ library takes over the CPU key, Triton the CUDA key (see ``_backends.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("sfgrpo", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op of the namespace and return its dispatcher entry, ready to be called.

    Args:
        schema: ``name(arguments) -> results`` in the dispatcher's schema language.
        reference: plain PyTorch, same arguments as the schema; it is the op's specification.
        fake: shapes and dtypes of the results, without data.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfgrpo::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sfgrpo, name).default


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Attach an autograd formula to an op defined here."""
    torch.library.register_autograd(
        f"sfgrpo::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register ``kernel`` for one dispatch key, e.g. ``"CUDA"``."""
    _LIBRARY.impl(name, kernel, key)
