"""Checks that are made once for every kind of arguments, not in every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

Answer = TypeVar("Answer")
MOST_KINDS = 1024
"""Of arguments remembered for one check; sizes that never repeat must not fill the memory."""


def remembered(check: Callable[..., Answer]) -> Callable[..., Answer]:
    """``check``, which is asked again only about arguments of a kind that it has not passed.

    What it answers may depend on the gradient mode, on the values of numbers and strings and, of
    tensors, on nothing but type, dtype, shape, device, layout and whether they require grad.
    """
    answers: dict[object, Answer] = {}

    @wraps(check)
    def recall(*args: Any) -> Answer:
        if torch.compiler.is_compiling():
            return check(*args)
        kind: Any = [torch.is_grad_enabled()]
        try:
            for arg in args:
                # First what most arguments are: in a small call a function for each is felt.
                if type(arg) is Tensor:
                    kind.append(_described(arg))
                else:
                    kind.append(None if arg is None else _kind(arg))
            kind = tuple(kind)
            answer = answers.get(kind)
        except (TypeError, RuntimeError):
            # A size of a graph, or a list, has no hash, and some nested tensors have no shape.
            answer = kind = None
        if answer is None:
            answer = check(*args)
            if len(answers) >= MOST_KINDS:
                answers.clear()
            if kind is not None:
                answers[kind] = answer
        return answer

    return recall


_described = attrgetter("dtype", "shape", "device", "layout", "requires_grad")


def _kind(arg: Any) -> object:
    if isinstance(arg, Tensor):
        return type(arg), *_described(arg)
    # With its type, since True equals 1.
    return type(arg), tuple(map(_kind, arg)) if isinstance(arg, tuple) else arg
