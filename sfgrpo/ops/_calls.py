"""What the public functions call in place of an op: the same, without what a plain call can spare.

The dispatcher reaches a kernel through whatever was registered for autograd, and what Python
registers there costs as much as all the rest of a call, or more.  A plain call knows before
whether a gradient is recorded, and goes past it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from sfgrpo.ops._library import (
    DEFINITIONS,
    LIBRARY,
    forward_differentiated,
    mark_overwritten,
    refuse_tangents,
)


def _plain() -> bool:
    """Whether nothing looks at the call that would have to see the op itself."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_differentiated()
    )


def in_place(name: str) -> Callable[[Any], Any]:
    """What calls an op that overwrites operands; it takes the record, or the record's beginning.

    Where gradients are recorded for an operand the op itself is called, which refuses.
    """
    op = getattr(torch.ops.sfgrpo, name).default
    direct = op._op

    def call(o: Any) -> Any:
        if not _plain() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*o)):
            return op(*o)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = direct(*o)
        mark_overwritten(name, o)
        return results

    return call


def without_gradient(op: Any) -> Callable[..., Any]:
    """``op``, whose results ask for no gradient even where its operands do.

    ``torch.no_grad()`` takes as long as all checks of a step together, and is left to the calls
    that need it.
    """
    # What OpOverload.__call__ passes its arguments on to.
    direct = op._op

    def call(*args: Any) -> Any:
        if not _plain() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
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

    torch.library.register_autograd(f"sfgrpo::{name}", gradients, setup_context=keep, lib=LIBRARY)

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
        if forward_differentiated():
            refuse_tangents(name, o)
        if torch.is_grad_enabled():
            asked = differentiable(o)
            if torch._C._any_requires_grad(*asked):
                return plain.apply(o, *asked)
        return compute(*o)

    return call


def differentiate_once(name: str) -> Callable[[Any], Any]:
    """What calls the backward of an op; to ask for a gradient of its results is an error.

    A second derivative of a density or a loss is asked for seldom, and would take a kernel for
    every pair of operands.  Without an error PyTorch takes the gradient for a constant:
    ``torch.func.grad`` of it is 0, without a word.
    """
    types = get_type_hints(DEFINITIONS[name].record)
    tensors = tuple(field for field, kind in types.items() if kind in (Tensor, Tensor | None))

    def refuse(ctx: Any, needed: dict[str, bool], *grads: Tensor) -> dict[str, Tensor | None]:
        raise RuntimeError(
            f"sfgrpo.ops.{name.removesuffix('_backward')}: got its gradient to differentiate, "
            "expected one differentiation: the fused backward has no gradient; write the formula "
            "in PyTorch's own operations"
        )

    return differentiate(name, refuse, lambda ctx, o, output: None, tensors)
