"""Operators on tensors of the meta device, each asked once for a combination of shapes.

PyTorch computes the shapes of many operators in Python, half a millisecond a call, and a network
asks the same of its every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor that has memory of its own."""

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)


class Shapes:
    """Calls operators; of those that only make new tensors, the first time alone."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[type | None, list[Form | None]]] = {}
        """By what was asked: the type of several results, and the form of each."""

    def __call__(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """`func(*args, **kwargs)`, or tensors of the same shapes."""
        if not _makes_tensors(func):
            return func(*args, **kwargs)
        try:
            key = func, _told(args), _told(kwargs.values()), tuple(kwargs)
        except _NotMeta:
            return func(*args, **kwargs)
        if key in self._known:
            several, forms = self._known[key]
            made = [_made(form) for form in forms]
            return made[0] if several is None else several(made)
        result = func(*args, **kwargs)
        several = type(result) if isinstance(result, tuple | list) else None
        results = [result] if several is None else list(result)
        if (forms := _forms(results, tree_leaves((args, dict(kwargs))))) is not None:
            self._known[key] = several, forms
        return result


class _NotMeta(Exception):
    """An argument of another device, or one that says nothing in a key."""


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operator writes over nothing and hands out no view."""
    schema = func._schema
    return not schema.is_mutable and not any(item.alias_info for item in schema.returns)


def _told(values: Iterable[Any]) -> tuple[Any, ...]:
    """What of arguments decides the results' shapes."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.device.type != "meta":
                raise _NotMeta
            found.append((value.shape, value.stride(), value.dtype, value.is_conj()))
        elif isinstance(value, PLAIN):
            found.append((type(value), value))  # 1, 1.0 and True are equal
        elif isinstance(value, tuple | list):
            found.append(_told(value))
        else:
            raise _NotMeta
    return tuple(found)


def _forms(results: list[Any], given: list[Any]) -> list[Form | None] | None:
    """The forms of results, None if one is no tensor with memory of its own."""
    forms, taken = list[Form | None](), [_memory(value) for value in given]
    for result in results:
        if result is None:
            forms.append(None)
            continue
        meta = isinstance(result, Tensor) and result.device.type == "meta"
        if not meta or _memory(result) in taken:
            return None
        taken.append(_memory(result))
        form = result.shape, result.stride(), result.dtype
        made = _made(form)
        if made is None or made.untyped_storage().nbytes() != result.untyped_storage().nbytes():
            return None
        forms.append(form)
    return forms


def _memory(value: Any) -> Any:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _made(form: Form | None) -> Tensor | None:
    if form is None:
        return None
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
