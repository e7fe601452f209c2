"""Runs the Triton launchers on CPU tensors, in Triton's interpreter.

`TRITON_INTERPRET=1` has to be set before Triton is first imported (tests/conftest.py does it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

EPS = 2.0**-24
"""Rounding error of one fp32 operation, relative."""

_original_cast = InterpreterBuilder.cast_impl


def _cast(builder: InterpreterBuilder, source: TensorHandle, dst_type: Any) -> TensorHandle:
    """Round fp32 to the nearest bf16, as GPUs do; the interpreter of Triton 3.7 truncates."""
    if source.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return _original_cast(builder, source, dst_type)


def interpret(launcher: Callable[..., Any], *args: object) -> Any:
    """Call a launcher in the interpreter, with NaN in every tensor it leaves uninitialised."""
    # This mode fills fresh tensors with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(InterpreterBuilder, "cast_impl", _cast):
            return launcher(*args)
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def launches(*, run: bool = True) -> Iterator[list[str]]:
    """The names of the kernels launched inside, which `run` or are only recorded."""
    seen: list[str] = []
    original = InterpretedFunction.run

    def record(kernel: InterpretedFunction[Any], *args: object, **options: Any) -> None:
        seen.append(kernel.__name__)
        if run:
            with _disable_current_modes():  # the interpreter's own handling of tensors
                original(kernel, *args, **options)

    with mock.patch.object(InterpretedFunction, "run", record):
        yield seen


class NoTorchKernels(TorchDispatchMode):
    """Inside, PyTorch may allocate memory and make views: all else launches a kernel on a GPU."""

    ALLOWED = frozenset(
        ("empty", "new_empty", "empty_like", "slice", "select", "expand", "view", "detach", "alias")
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name in self.ALLOWED, f"aten::{name}"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def program_order(order: Callable[[int, int], int]) -> Iterator[None]:
    """Run the i-th of n programs in place of `order(i, n)`."""
    original = InterpreterBuilder.set_grid_idx

    def set_index(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        original(builder, order(x, builder.grid_dim[0]), y, z)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", set_index):
        yield


@dataclass
class Traffic:
    """Bytes that the kernels asked for; an element asked for twice counts twice."""

    loaded: int = 0
    stored: int = 0
    atomic: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored + self.atomic


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the lanes of every load, store and atomic that are not masked off."""
    count = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    update = InterpreterBuilder.create_atomic_rmw

    def size(pointers: TensorHandle, mask: TensorHandle) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count.loaded += size(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.stored += size(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def counted_update(builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *r: Any) -> Any:
        count.atomic += size(pointers, mask)
        return update(builder, op, pointers, value, mask, *r)

    patches = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_update,
    }
    with contextlib.ExitStack() as stack:
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, patch))
        yield count


def rows(
    batch: int, row_elements: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Tensor:
    """Normal latents `[B, D]`."""
    generator = torch.Generator().manual_seed(1000 * seed + row_elements)
    return torch.randn(batch, row_elements, generator=generator).to(dtype)


def coefficients(batch: int, *, noise_free: tuple[int, ...] = ()) -> Tensor:
    """`[B, 4]` of (a, b, n, t) as samplers give them; the listed rows have n = 0."""
    fraction = torch.linspace(0.1, 0.9, batch)
    table = torch.stack((1 - 0.1 * fraction, -0.2 * fraction, 0.05 + 0.4 * fraction, fraction), 1)
    table[list(noise_free), 2] = 0.0
    return table.contiguous()


def double(*args: object) -> Any:
    """The same arguments with every floating tensor in float64, for an exact reference."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def residual_error(
    x: Tensor, v: Tensor, x_next: Tensor, coef: Tensor, v_uncond: Tensor | None, guidance: float
) -> tuple[Tensor, Tensor]:
    """Residual x_next - a x - b v in float64 `[B, D]`, and a bound on its fp32 rounding error.

    Each of the at most eight operations on the way rounds once, relative to a partial result
    no larger than the sum of the magnitudes.
    """
    a, b = coef[:, 0:1].double(), coef[:, 1:2].double()
    x, v, x_next = x.double(), v.double(), x_next.double()
    guided, size = v, v.abs()
    if v_uncond is not None:
        guided = v_uncond.double() + guidance * (v - v_uncond.double())
        size = v_uncond.double().abs() + abs(guidance) * (v.abs() + v_uncond.double().abs())
    bound = 8 * EPS * ((a * x).abs() + b.abs() * size + x_next.abs())
    return x_next - a * x - b * guided, bound


def logp_error(residual: Tensor, bound: Tensor, n: Tensor) -> Tensor:
    """Bound `[B]` on the fp32 error of the log-density per element; 0 for noise-free rows.

    The residuals' own errors, then (log2 D + 12) roundings of the positive sum of squares and of
    the scaling, and a few of ln n and the constant.
    """
    if residual.shape[1] == 0:
        return torch.zeros(residual.shape[0], dtype=torch.float64)
    noisy = n > 0
    variance = torch.where(noisy, n * n, 1.0).double()
    depth = np.log2(residual.shape[1]) + 12
    square = residual.square().mean(1) / (2 * variance)
    carried = ((residual.abs() + bound) * bound).mean(1) / variance
    constants = 4 * EPS * (variance.log().abs() / 2 + 2)
    return torch.where(noisy, carried + depth * EPS * square + constants, 0.0)
