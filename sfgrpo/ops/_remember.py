"""Checks that are made once for every kind of arguments, not in every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Answer = TypeVar("Answer")
MOST_KINDS = 1024
"""Of arguments remembered for one check; sizes that never repeat must not fill the memory."""


def remembered(check: Callable[..., Answer]) -> Callable[..., Answer]:
    """``check``, which is asked again only about arguments of a kind that it has not passed.

    What it answers may depend on the gradient mode, on the values of numbers and strings and, of
    tensors, on nothing but type, dtype, shape, device and whether they require grad.
    """
    answers: dict[object, Answer] = {}

    @wraps(check)
    def recall(*args: Any) -> Answer:
        if torch.compiler.is_compiling():
            return check(*args)
        kind = (torch.is_grad_enabled(), *map(_kind, args))
        try:
            answer = answers.get(kind)
        except TypeError:  # a size of a graph, or a list, has no hash
            answer = kind = None
        if answer is None:
            answer = check(*args)
            if len(answers) >= MOST_KINDS:
                answers.clear()
            if kind is not None:
                answers[kind] = answer
        return answer

    return recall


def _kind(arg: Any) -> object:
    if arg is None:
        return None
    if isinstance(arg, Tensor):
        return type(arg), arg.dtype, arg.shape, arg.device, arg.requires_grad
    # With its type, since True equals 1.
    return type(arg), tuple(map(_kind, arg)) if isinstance(arg, tuple) else arg
