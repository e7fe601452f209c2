"""Whether an op may overwrite an operand: where in memory its operands lie.

What one call has found says nothing about the next, whose tensors lie elsewhere.  So the question
that almost every call answers alike comes first, and is cheap: whether all operands are contiguous
and lie apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor


def overwritable(o: Any, written: Sequence[str]) -> None:
    """Operands that an op may overwrite: no other operand has memory in common with them.

    As in PyTorch's own ops one that is only read may be the overwritten one, element by element.
    Where storage is not known (tracing, meta tensors, wrappers) nothing is checked.

    Args:
        o: the op's record, everything it takes.
        written: names of what it overwrites.
    """
    if not torch.compiler.is_compiling() and not _apart(o, written):
        _check_places(o._asdict(), written)


_NO_TENSORS = frozenset({type(None), bool, int, float})


def _apart(o: Any, written: Sequence[str]) -> bool:
    """Whether all tensors are contiguous and what is written meets none of the others.

    False only says that this quick look does not know.
    """
    if torch._C._are_functorch_transforms_active():  # a wrapper has no address
        return False
    extents = []
    for value in o:
        kind = type(value)
        if kind is Tensor and value.is_contiguous():
            start = value.data_ptr()
            extents.append((start, start + value.nbytes))
        elif kind not in _NO_TENSORS:
            return False
    for name in written:
        target = getattr(o, name)
        if target is not None:
            if target.is_neg():
                return False
            first = target.data_ptr()
            last = first + target.nbytes
            met = [1 for start, end in extents if start < last and first < end]
            if len(met) > 1:  # itself is one
                return False
    return True


def _check_places(operands: Mapping[str, object], written: Sequence[str]) -> None:
    places = {name: _place(value) for name, value in operands.items()}
    for name in written:
        target = places[name]
        if target is None:
            continue
        if target.tensor.is_neg():
            raise ValueError(
                f"{name}: got a view of negated values, such as the imaginary part of a "
                "conjugate, expected a tensor that holds its values itself: the op writes over "
                f"them; pass {name}.resolve_neg()"
            )
        if target.meets_itself():
            raise ValueError(
                f"{name}: got an expanded tensor, expected one with its own storage: several of "
                "its elements lie in one place, and the op writes over them"
            )
        for other, place in places.items():
            if place is None or other == name or not target.meets(place):
                continue
            if other in written or place.layout != target.layout:
                raise ValueError(
                    f"{name}: shares memory with {other}, expected memory of its own: "
                    f"the op writes over {name}; pass {name}.clone()"
                )


def traced_together(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors without known places, as in tracing, are views of one storage."""
    if other is None or (_place(one) and _place(other)):
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Place:
    """Where the elements of a tensor lie, in bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        contiguous = tensor.is_contiguous()
        count = tensor.numel() if contiguous else 1 + _span(self._steps())
        self.contiguous, self.end = contiguous, self.start + count * self.itemsize

    def _steps(self) -> list[tuple[int, int]]:
        """(size, stride) of the dimensions longer than 1, in elements, widest stride first."""
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return sorted((step for step in sizes if step[0] > 1), key=lambda step: -step[1])

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal for tensors whose elements of one index lie in one place."""
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return (self.start, self.itemsize, *(step for step in sizes if step[0] > 1))

    def meets(self, other: _Place) -> bool:
        """Whether a byte belongs to both; views of unlike strides count by their extents."""
        if self.end <= other.start or other.end <= self.start:
            return False
        apart, fraction = divmod(other.start - self.start, self.itemsize)
        steps = self._steps()
        if self.itemsize != other.itemsize or fraction or steps != other._steps():
            return True
        return _reached(steps, apart)

    def meets_itself(self) -> bool:
        """Whether two elements lie in one place."""
        return not self.contiguous and _reached(self._steps(), 0, moved=False)


def _span(steps: Sequence[tuple[int, int]]) -> int:
    return sum((size - 1) * stride for size, stride in steps)


def _reached(steps: Sequence[tuple[int, int]], distance: int, moved: bool = True) -> bool:
    """Whether two indices lie ``distance`` elements apart; two different ones, unless ``moved``."""
    if not steps:
        return moved and distance == 0
    (size, stride), inner = steps[0], steps[1:]
    if stride == 0:
        return distance == 0
    span = _span(inner)
    first = max(-((span - distance) // stride), 1 - size)
    last = min((distance + span) // stride, size - 1)
    counts = range(first, last + 1)
    return any(_reached(inner, distance - k * stride, moved or k != 0) for k in counts)


def _place(value: Any) -> _Place | None:
    """None for what is no tensor, has no elements, or keeps its storage from us."""
    if not isinstance(value, Tensor):
        return None
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    known = type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"
    return _Place(value) if known and value.numel() else None
