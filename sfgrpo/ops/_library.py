"""The ``sfgrpo`` operator namespace: where an op's record becomes a schema and meets its kernels.

A NamedTuple per op is the one list of what it takes: its fields are the schema's arguments, and the
reference, the fake kernel, the autograd formula and the Triton launcher take the record itself,
which they call ``o``.

PyTorch's dispatcher is the only switch between backends.  The plain-PyTorch reference of an op
is registered at CompositeExplicitAutograd, hence serves every device that has nothing better, and
says so once; the C++ library takes over the CPU key, Triton the CUDA key (see ``_backends.py``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("sfgrpo", "DEF")
Record = TypeVar("Record", bound=NamedTuple)

Choice = Annotated[int, "int"]
"""Type of a field that selects a formula: a graph is compiled for its value, unlike other ints."""

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    Choice: "int",
    float: "float",
    float | None: "float?",
    bool: "bool",
    torch.dtype: "ScalarType",
}


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One op of the namespace."""

    record: Any
    """The NamedTuple of the operands."""
    module: str
    """Name of the op's module here, and of the one in ``sfgrpo.kernels`` that launches it."""
    written: tuple[str, ...]
    """The operands that the op overwrites."""
    instead: str
    """What to use where an op cannot overwrite them."""
    float64_on_gpus: bool
    """Whether the launcher takes float64; otherwise the reference serves it."""


DEFINITIONS: dict[str, Definition] = {}
REFERENCES: dict[str, Callable[..., Any]] = {}
"""Op -> its specification, which takes what the op takes."""


def define(
    name: str,
    record: Callable[..., Record],
    reference: Callable[[Record], Any],
    fake: Callable[[Record], Any] = lambda o: None,
    *,
    written: tuple[str, ...] = (),
    instead: str = "",
    without: tuple[str, ...] = (),
    float64_on_gpus: bool = False,
) -> Any:
    """Define one op of the namespace and return its dispatcher entry, ready to be called.

    Args:
        name: of the op and of its Triton launcher.
        record: NamedTuple of the operands; its fields, in their order, are the schema's arguments.
        reference: plain PyTorch; it is the op's specification, and its annotation says how many
            tensors the op returns.
        fake: shapes and dtypes of the results, without data; not needed without results.
        written: operands that the op overwrites.
        instead: what to use where it cannot; the op of its name without underscore if not given.
        without: last fields of the record, those with defaults, that this op does not take.
        float64_on_gpus: whether the Triton launcher takes float64.
    """
    definition = Definition(
        record=record,
        module=reference.__module__.rpartition(".")[2],
        written=written,
        instead=instead or name.removesuffix("_"),
        float64_on_gpus=float64_on_gpus,
    )
    schema = name + _schema(definition, reference, without)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    DEFINITIONS[name] = definition
    REFERENCES[name] = taking(record, reference)
    LIBRARY.impl(name, announced(REFERENCES[name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfgrpo::{name}", taking(record, fake), lib=LIBRARY)
    op = getattr(torch.ops.sfgrpo, name).default
    if written:
        _work_in_place(name, op)
    return op


def taking(record: Callable[..., Record], function: Callable[[Record], Any]) -> Callable[..., Any]:
    """``function``, which takes the record, as the dispatcher calls it."""

    @functools.wraps(function)
    def unpacked(*args: Any) -> Any:
        return function(record(*args))

    return unpacked


def _schema(definition: Definition, reference: Callable[..., Any], without: tuple[str, ...]) -> str:
    """``(arguments) -> results`` in the dispatcher's schema language."""
    types = get_type_hints(definition.record, include_extras=True)
    names = tuple(types)[: len(types) - len(without)]
    if (*names, *without) != tuple(types):
        raise ValueError(f"without: got {without}, expected the last of {tuple(types)}")
    arguments = []
    for name in names:
        if types[name] not in _SCHEMA_TYPES:
            known = ", ".join(_SCHEMA_TYPES.values())
            raise TypeError(f"{name}: got type {types[name]}, expected what a schema has: {known}")
        kind = _SCHEMA_TYPES[types[name]]
        if name in definition.written:
            alias = "ab"[definition.written.index(name)]
            kind = kind.replace("Tensor", f"Tensor({alias}!)")
        arguments.append(f"{kind} {name}")
    result = get_type_hints(reference)["return"]
    several = () if result is type(None) else get_args(result)
    results = "Tensor" if result is Tensor else f"({', '.join('Tensor' for _ in several)})"
    return f"({', '.join(arguments)}) -> {results}"


def _work_in_place(name: str, op: Any) -> None:
    """Tell autograd and ``torch.vmap`` of an op that overwrites operands.

    An operand that asks for a gradient is an error, and the version of what is overwritten goes up,
    so that a graph which had saved it refuses to run.
    """
    fields, instead = DEFINITIONS[name].record._fields, DEFINITIONS[name].instead

    def refuse_vmap(*args: Any) -> Any:
        raise RuntimeError(
            f"sfgrpo::{name}: got a batch of torch.vmap, expected tensors that it can write over; "
            f"use {instead}"
        )

    def refuse_gradients(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_differentiated():
            refuse_tangents(name, args)
        if torch.is_grad_enabled():
            for field, value in zip(fields, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"sfgrpo::{name}: {field} requires grad, but the op works in place "
                        f"and has no gradient; use {instead}, or torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump_versions(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        mark_overwritten(name, args)
        return results

    LIBRARY.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    LIBRARY.impl(name, bump_versions, "ADInplaceOrView", with_keyset=True)
    torch.library.register_vmap(f"sfgrpo::{name}", refuse_vmap, lib=LIBRARY)


def forward_differentiated() -> bool:
    """Whether tensors may carry tangents, as within ``torch.autograd.forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Forward differentiation is an error: results would come without a tangent, as if constant,
    and what is overwritten would keep the tangent of what it was."""
    for field, value in zip(DEFINITIONS[name].record._fields, args, strict=False):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"sfgrpo::{name}: {field} carries a tangent, but the op has no derivative in "
                "forward mode; differentiate in reverse, or pass forward_ad.unpack_dual(...).primal"
            )


def mark_overwritten(name: str, args: Sequence[Any]) -> None:
    """Raise the versions of what the op ``name`` has overwritten of its arguments."""
    definition = DEFINITIONS[name]
    for operand in definition.written:
        tensor = args[definition.record._fields.index(operand)]
        if tensor is not None and not tensor.is_inference():  # those have no version
            torch.autograd.graph.increment_version(tensor)


def vectorise(name: str, rule: Callable[..., Any]) -> None:
    """Attach a ``torch.vmap`` rule to an op defined here (see ``_vmap.py``)."""
    torch.library.register_vmap(f"sfgrpo::{name}", rule, lib=LIBRARY)


def implement(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register ``kernel`` for one dispatch key, e.g. ``"CUDA"``."""
    LIBRARY.impl(name, kernel, key)


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
