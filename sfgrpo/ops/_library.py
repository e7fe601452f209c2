"""The ``sfgrpo`` operator namespace: where a schema meets its reference and its fake kernel.

PyTorch's dispatcher is the only switch between backends.  The plain-PyTorch reference of an op
is registered at CompositeExplicitAutograd, hence serves every device that has nothing better, and
says so once; the C++ library takes over the CPU key, Triton the CUDA key (see ``_backends.py``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sfgrpo", "DEF")
REFERENCES: dict[str, Callable[..., Any]] = {}
"""Op -> its specification."""


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op of the namespace and return its dispatcher entry, ready to be called.

    Args:
        schema: ``name(arguments) -> results`` in the dispatcher's schema language.
        reference: plain PyTorch, same arguments as the schema; it is the op's specification.
        fake: shapes and dtypes of the results, without data.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, announced(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfgrpo::{name}", fake, lib=_LIBRARY)
    REFERENCES[name] = reference
    return getattr(torch.ops.sfgrpo, name).default


def define_in_place(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """As ``define``, for an op that overwrites the arguments its schema marks ``(a!)``.

    Autograd learns of it in both directions: an argument that asks for a gradient is an error, and
    the version of what is overwritten goes up, so that a graph which had saved it refuses to run.
    """
    op = define(schema, reference, fake)
    name = schema.partition("(")[0]

    def refuse_gradients(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(op._schema.arguments, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"sfgrpo::{name}: {argument.name} requires grad, but the op works in place "
                        f"and has no gradient; use {name[:-1]}, or torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump_versions(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for argument, value in zip(op._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                torch.autograd.graph.increment_version(value)
        return results

    _LIBRARY.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    _LIBRARY.impl(name, bump_versions, "ADInplaceOrView", with_keyset=True)
    return op


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Attach an autograd formula to an op defined here and return what is to be called.

    That is the op, except under ``torch.func``'s transforms: these look for an autograd.Function
    in the caller's hands and do not find one behind the dispatcher (PyTorch 2.13).
    """
    op = getattr(torch.ops.sfgrpo, name).default
    torch.library.register_autograd(
        f"sfgrpo::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type(f"sfgrpo_{name}", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*args)
        return function.apply(*args)

    return call


def vectorise(name: str, rule: Callable[..., Any]) -> None:
    """Attach a ``torch.vmap`` rule to an op defined here (see ``_vmap.py``)."""
    torch.library.register_vmap(f"sfgrpo::{name}", rule, lib=_LIBRARY)


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register ``kernel`` for one dispatch key, e.g. ``"CUDA"``."""
    _LIBRARY.impl(name, kernel, key)


def announced(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a backend of its own: it says once that it serves a device."""

    @functools.wraps(reference)
    def serve(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if device not in ("cpu", "meta"):  # without C++ the CPU is announced when that is found
            announce(f"device '{device}'")
        return reference(*args)

    return serve


@functools.cache
def announce(what: str) -> None:
    """Warn, once per process, that plain PyTorch serves the ops for ``what``."""
    warnings.warn(
        f"sfgrpo: no fused kernels for {what}: plain PyTorch serves the ops there, with the same "
        "results in several passes over memory instead of one",
        RuntimeWarning,
        stacklevel=2,
    )
