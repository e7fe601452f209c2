"""Argument checks of the public functions: each message names the argument, got and expected.

Only shapes, dtypes, devices and Python scalars are looked at, never the data of a tensor, so the
checks vanish under torch.compile and never make an accelerator's host thread wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense(name: str, tensor: Tensor, expected: str = "a tensor") -> None:
    """A tensor that has an element for every index."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected {expected}")
    # Nested ones, some of which call themselves strided, come first: others know their layout.
    if tensor.is_nested:
        raise TypeError(
            f"{name}: got a nested tensor, expected a dense one, whose rows have one size; see "
            "torch.nested.to_padded_tensor"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name}: got layout {tensor.layout}, expected a dense tensor; pass {name}.to_dense()"
        )


def latents(name: str, tensor: Tensor) -> None:
    """A floating-point ``[B, ...]`` tensor."""
    dense(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if tensor.ndim == 0:
        raise ValueError(f"{name}: got a scalar tensor, expected a leading batch dimension")


def like(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Latents of the shape, device and precision class (float64 or not) of ``x``."""
    latents(name, tensor)
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(x.shape)} like {x_name}"
        )
    same_device(name, tensor, x)
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"{name}: got dtype {tensor.dtype} beside {x_name} in {x.dtype}, "
            "expected either all float64 or none"
        )


def same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {x.device}")


def row_dtype(x: Tensor) -> torch.dtype:
    """Dtype of everything that holds one number per row: the arithmetic's own."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_row(name: str, tensor: Tensor, x: Tensor, *, columns: int | None = None) -> None:
    """``[B]`` (or ``[B, columns]``) in float32, or float64 where ``x`` is."""
    dense(name, tensor)
    if tensor.dtype != row_dtype(x):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {row_dtype(x)}")
    expected = (x.shape[0],) if columns is None else (x.shape[0], columns)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    same_device(name, tensor, x)


def coefficients(coef: Tensor, x: Tensor) -> None:
    per_row("coef", coef, x, columns=4)


def no_grad(**tensors: Tensor | None) -> None:
    """Refuse tensors that ask for a gradient the op does not give."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none: there is no gradient "
                f"with respect to {name} here; pass {name}.detach()"
            )


def number(name: str, value: Any, low: float = -math.inf) -> float:
    """A finite number, Python's or numpy's, at least ``low``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    # Not math.isfinite, which no graph of moving numbers has (torch.compile with dynamic=True).
    if not low <= value < math.inf or value == -math.inf:
        bound = "" if low == -math.inf else f" >= {low:g}"
        raise ValueError(f"{name}: got {value}, expected a finite number{bound}")
    return float(value)


def clip_bounds(value: float | Sequence[float]) -> tuple[float, float]:
    """(low, high) of one number or of two."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"clip_range: got {len(pair)} numbers, expected one or (low, high)")
    low, high = (number("clip_range", bound, 0.0) for bound in pair)
    return low, high


def seed(value: int) -> int:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed: got {type(value).__name__}, expected an int")
    if not 0 <= value < 2**63:
        raise ValueError(f"seed: got {value}, expected 0 <= seed < 2**63")
    return value


def sample_ids(ids: Tensor, rows: int | None = None, device: torch.device | None = None) -> None:
    """int64 ``[B]``."""
    dense("sample_ids", ids, "an int64 tensor")
    if ids.dtype != torch.int64:
        raise TypeError(f"sample_ids: got dtype {ids.dtype}, expected torch.int64")
    if ids.ndim != 1 or (rows is not None and ids.shape[0] != rows):
        expected = "[B]" if rows is None else f"({rows},)"
        raise ValueError(f"sample_ids: got shape {tuple(ids.shape)}, expected {expected}")
    if device is not None and ids.device != device:
        raise ValueError(f"sample_ids: got device {ids.device}, expected {device}")


def steps(ids: int | Tensor) -> tuple[int, Tensor | None]:
    """One step for all rows, an int in [0, 2**32), or a tensor, for ``step_ids`` to check.

    Returns the two as the schemas take them: (step of all rows, steps of the rows or None).
    """
    if isinstance(ids, Tensor):
        return 0, ids
    ids = ids.item() if isinstance(ids, np.generic) else ids
    if isinstance(ids, bool) or not isinstance(ids, int):
        raise TypeError(f"step_ids: got {type(ids).__name__}, expected an int or an int64 tensor")
    if not 0 <= ids < 2**32:
        raise ValueError(f"step_ids: got {ids}, expected 0 <= step < 2**32")
    return ids, None


def step_ids(ids: Tensor, samples: Tensor) -> None:
    """int64 ``[B]``, of which the low 32 bits are used."""
    dense("step_ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"step_ids: got dtype {ids.dtype}, expected torch.int64")
    if ids.shape != samples.shape:
        raise ValueError(f"step_ids: got shape {tuple(ids.shape)}, expected {tuple(samples.shape)}")
    same_device("step_ids", ids, samples)


def not_a_leaf(name: str, tensor: Tensor | None) -> None:
    """Refuse a parameter, or a view of one, whose memory a gradient is to take."""
    if tensor is None or not tensor.requires_grad:
        return
    # Tracing does not know the base of a view.
    base = None if torch.compiler.is_compiling() else tensor._base
    if (tensor if base is None else base).is_leaf:
        raise ValueError(
            f"{name}: got a leaf that requires grad, expected the result of a computation: "
            "the gradient would take the place of its values"
        )
