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
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sfgrpo", "DEF")
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
        without: last fields of the record, those with defaults, that this op does not take.
        float64_on_gpus: whether the Triton launcher takes float64.
    """
    definition = Definition(
        record=record,
        module=reference.__module__.rpartition(".")[2],
        written=written,
        float64_on_gpus=float64_on_gpus,
    )
    schema = name + _schema(definition, reference, without)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    DEFINITIONS[name] = definition
    REFERENCES[name] = taking(record, reference)
    _LIBRARY.impl(name, announced(REFERENCES[name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfgrpo::{name}", taking(record, fake), lib=_LIBRARY)
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
    """Tell autograd of an op that overwrites operands, in both directions.

    An operand that asks for a gradient is an error, and the version of what is overwritten goes up,
    so that a graph which had saved it refuses to run.
    """
    fields = DEFINITIONS[name].record._fields
    written = [fields.index(operand) for operand in DEFINITIONS[name].written]

    def refuse_gradients(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for field, value in zip(fields, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"sfgrpo::{name}: {field} requires grad, but the op works in place "
                        f"and has no gradient; use {name[:-1]}, or torch.no_grad()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump_versions(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for index in written:
            if args[index] is not None:
                torch.autograd.graph.increment_version(args[index])
        return results

    _LIBRARY.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    _LIBRARY.impl(name, bump_versions, "ADInplaceOrView", with_keyset=True)


def without_gradient(op: Any) -> Callable[..., Any]:
    """``op``, whose results ask for no gradient even where its operands do.

    ``torch.no_grad()`` takes as long as all checks of a step together, and is left to the calls
    that need it.
    """
    # What OpOverload.__call__ passes its arguments on to.
    direct = op._op

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        ):
            with torch.no_grad():
                return op(*args)
        return direct(*args)

    return call


def differentiate(
    name: str,
    backward: Callable[..., dict[str, Tensor | None]],
    setup_context: Callable[[Any, Any, Any], None],
    operands: tuple[str, ...],
) -> Callable[..., Any]:
    """Attach an autograd formula to an op defined here and return what is to be called.

    That is the op only while a graph is compiled, and for who calls the op itself.
    ``torch.func``'s transforms look for an autograd.Function in the caller's hands and do not find
    one behind the dispatcher (PyTorch 2.13).  A plain call goes to another one, since the
    dispatcher's own reads the schema anew in every call: as long as all the rest takes together.
    To PyTorch that one is a function of ``operands`` only, as each further argument costs time.

    Args:
        name: of the op.
        backward: ``(ctx, needed, *gradients of the results)`` -> gradients of the operands by name;
            ``needed`` says by name of which of ``operands`` one is wanted.
        setup_context: ``(ctx, operands, results)``; keeps in ``ctx`` what backward needs.
        operands: names of those that have a gradient; no other one may ask for it.
    """
    op = getattr(torch.ops.sfgrpo, name).default
    record = DEFINITIONS[name].record
    differentiable = operator.itemgetter(*map(record._fields.index, operands))
    no_gradients = dict.fromkeys(record._fields)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, record(*inputs), output)

    def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = dict(zip(operands, differentiable(ctx.needs_input_grad), strict=True))
        return tuple((no_gradients | backward(ctx, needed, *grads)).values())

    torch.library.register_autograd(f"sfgrpo::{name}", gradients, setup_context=keep, lib=_LIBRARY)

    direct = op._op

    def compute(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return direct(*args)

    def compute_and_keep(ctx: Any, o: Any, *_: Tensor | None) -> Any:
        output = compute(*o)
        setup_context(ctx, o, output)
        return output

    def gradients_of_operands(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = dict(zip(operands, ctx.needs_input_grad[1:], strict=True))
        return (None, *map(backward(ctx, needed, *grads).get, operands))

    def function(**members: Any) -> Any:
        methods: dict[str, Any] = {key: staticmethod(member) for key, member in members.items()}
        return type(f"sfgrpo_{name}", (torch.autograd.Function,), methods)

    plain = function(forward=compute_and_keep, backward=gradients_of_operands)
    transformed = function(forward=compute, backward=gradients, setup_context=keep)
    transformed.generate_vmap_rule = True

    def call(o: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*o)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*o)
        if torch.is_grad_enabled():
            asked = differentiable(o)
            if torch._C._any_requires_grad(*asked):
                return plain.apply(o, *asked)
        return compute(*o)

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
