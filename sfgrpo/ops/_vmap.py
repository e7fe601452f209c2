"""``torch.vmap`` of the ops: a mapped dimension is either more rows, or a loop.

Ops whose every result belongs to a row (or, for the advantages, to a prompt) fold the mapped
dimension into the rows and launch once.  The loss is a sum over rows: mapped, it is one launch
per element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fold_into_rows(op: Callable[..., Any]) -> Callable[..., Any]:
    """Rule for ops whose tensors all start with the row dimension: ``[V, B, ...]`` -> one call.

    Randomness is as given by the ids: rows with equal ids get equal noise.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def folded(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            stacked = (
                arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            )
            return stacked.flatten(0, 1)

        rows = [folded(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
        count = next(row.shape[0] for row in rows if isinstance(row, Tensor))
        result = op(*rows)
        several = isinstance(result, tuple)
        split, out_dims = [], []
        for tensor in result if several else (result,):
            absent = tensor.shape[0] != count  # the placeholder of a result nobody asked for
            shape = (info.batch_size, count // info.batch_size)
            split.append(tensor if absent else tensor.unflatten(0, shape))
            out_dims.append(None if absent else 0)
        return (tuple(split), tuple(out_dims)) if several else (split[0], out_dims[0])

    return rule


def one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """Rule for ops that sum over rows: one call per element, results stacked."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def pick(index: int) -> tuple[Tensor, ...]:
            return op(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )

        results = zip(*map(pick, range(info.batch_size)), strict=True)
        stacked = tuple(map(torch.stack, results))
        return stacked, (0,) * len(stacked)

    return rule
