"""Operators that are asked once answer as those that are asked each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfgrpo.doctor.shapes import Shapes

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "broadcast": lambda x, y: x + y,
    "a float": lambda x, y: x.long() * 2.0,
    "an int": lambda x, y: x.long() * 2,
    "a bool": lambda x, y: x.long() * True,
    "another dtype": lambda x, y: x.bfloat16() + y,
    "transposed": lambda x, y: x.t().exp(),
    "as it lies": lambda x, y: torch.empty_like(x.t()),
    "several results": lambda x, y: torch.native_layer_norm(x, [5], None, None, 1e-5),
    "a list": lambda x, y: torch.cat([x, y], 0),
    "a view": lambda x, y: (x.view(-1), x[1:], x.t(), x.expand(2, 5, 5)),
    "nothing to do": lambda x, y: (x.contiguous(), x.to(x.dtype), y.contiguous()),
    "in place": lambda x, y: x.mul_(2),
    "out": lambda x, y: torch.add(x, y, out=x.new_empty(5, 5)),
    "new": lambda x, y: (torch.zeros(3, device="meta"), x.new_zeros(2), torch.zeros(3)),
    "complex": lambda x, y: torch.view_as_real(torch.complex(x, x).conj() * 2),
    "matrices": lambda x, y: torch.nn.functional.linear(x, x.bfloat16().float(), x[0]),
}


class Asked(TorchDispatchMode):
    """Every operator by way of `shapes`; keeps how many went further."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes, self.further = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def counted(*given: Any, **options: Any) -> Any:
            self.further += 1
            return func(*given, **options)

        counted._schema = func._schema
        return self.shapes(Named(func, counted), args, kwargs or {})


class Named:
    """A counted operator that is equal to itself however often it is wrapped."""

    def __init__(self, func: Any, counted: Any) -> None:
        self.func, self.counted, self._schema = func, counted, func._schema

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.counted(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.func is other.func

    def __hash__(self) -> int:
        return hash(self.func)


def told(result: Any, operands: list[Tensor]) -> list[Any]:
    """All that a ledger or a network sees of results."""
    memory = [x.untyped_storage()._cdata for x in operands]
    return [
        (
            type(x), x.shape, x.stride(), x.dtype, x.device, x.untyped_storage().nbytes(),
            [x.untyped_storage()._cdata == place for place in memory],
        )
        for x in tree_leaves(result)
    ]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_second_answer_is_the_first(name: str) -> None:
    call, shapes = CALLS[name], Shapes()
    for shape in ((5, 5), (1, 5), (5, 5)):
        operands = [torch.empty(5, 5, device="meta"), torch.empty(shape, device="meta")]
        expected = told(call(*operands), operands)
        for _ in range(2):
            with Asked(shapes):
                found = call(*operands)
            assert told(found, operands) == expected


def test_what_only_makes_tensors_is_asked_once() -> None:
    shapes, x = Shapes(), torch.empty(4, 5, device="meta")
    further = []
    for _ in range(2):
        with Asked(shapes) as asked:
            made = [(x + 1).exp(), (x + 2).exp(), torch.cat([x, x])]
            assert len({y.untyped_storage()._cdata for y in made}) == 3
        further.append(asked.further)
    assert further == [4, 0]


def test_values_that_are_there_are_computed() -> None:
    shapes = Shapes()
    for _ in range(2):
        with Asked(shapes):
            assert (torch.ones(3) + 1).tolist() == [2, 2, 2]
