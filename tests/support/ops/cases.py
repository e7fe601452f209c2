"""Rows for the tests, and for every op of the namespace the arguments to call it with.

Those are found by the names of the op's operands: a new op needs a line here only for a new name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfgrpo.ops._library import DEFINITIONS, REFERENCES

SHAPES = [(1,), (3,), (4,), (5,), (63,), (64,), (65,), (2, 3, 5), (1023,), (1025,), (4, 33, 31)]
"""Of one row: around the group of 4, the vector of 16, the round of 64 and the block of 1024."""

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (BF16, F32), (F16, F16), (F64, F64)]
"""Of (x, v)."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """B random transitions with every operand that any op takes; the last row is noise-free."""

    x: Tensor
    v: Tensor
    v_uncond: Tensor
    v_ref: Tensor
    v_old: Tensor
    noise: Tensor
    x_next: Tensor
    coef: Tensor
    logp_old: Tensor
    advantages: Tensor
    kl_scale: Tensor
    weights: Tensor
    grad: Tensor
    sample_ids: Tensor
    step_ids: Tensor
    rewards: Tensor
    mask: Tensor

    def replace(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Every tensor changed, e.g. moved to float64."""
        return Rows(**{name: change(value) for name, value in vars(self).items()})


def rows(
    batch: int = 4,
    shape: tuple[int, ...] = (3, 5),
    x_dtype: torch.dtype = F32,
    v_dtype: torch.dtype = F32,
    seed: int = 0,
) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    scalars = F64 if x_dtype == F64 else F32

    def normal(*size: int, dtype: torch.dtype = scalars) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=F64).to(dtype)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(batch, generator=generator, dtype=F64)).to(scalars)

    n = uniform(0.05, 0.6)
    if batch > 1:
        n[-1] = 0.0
    coef = torch.stack((uniform(0.8, 1.0), uniform(-0.2, -0.05), n, uniform(0.1, 0.9)), dim=1)
    x, v = normal(batch, *shape, dtype=x_dtype), normal(batch, *shape, dtype=v_dtype)
    wide = coef.reshape(batch, 4, *(1,) * len(shape)).double()
    noise = normal(batch, *shape, dtype=v_dtype)
    x_next = wide[:, 0] * x.double() + wide[:, 1] * v.double() + wide[:, 2] * noise.double()
    return Rows(
        x=x,
        v=v,
        v_uncond=(v.double() + 0.1 * normal(batch, *shape, dtype=F64)).to(v_dtype),
        v_ref=(v.double() + 0.1 * normal(batch, *shape, dtype=F64)).to(v_dtype),
        noise=noise,
        x_next=x_next.to(x_dtype),
        coef=coef,
        logp_old=normal(batch),
        advantages=normal(batch),
        kl_scale=uniform(0.5, 2.0),
        weights=uniform(0.1, 1.0),
        grad=normal(batch),
        sample_ids=torch.randint(-(2**62), 2**62, (batch,), generator=generator),
        step_ids=torch.randint(0, 2**32, (batch,), generator=generator),
        rewards=normal(2, max(batch, 1), 6),
        mask=torch.rand(2, max(batch, 1), 5, generator=generator) > 0.3,
        v_old=(v.double() + 0.1 * normal(batch, *shape, dtype=F64)).to(v_dtype),
    )


def arguments(r: Rows, full: bool) -> dict[str, tuple[Any, ...]]:
    """Op -> arguments in the schema's order, with (``full``) or without its optional operands."""

    def optional(value: Any) -> Any:
        return value if full else None

    names = ("v_uncond", "v_ref", "v_old", "noise", "kl_scale", "weights", "mask", "step_ids")
    values: dict[str, Any] = {
        **vars(r),
        **{name: optional(getattr(r, name)) for name in names},
        "seed": 12345678901234,
        "step": 0 if full else 2**31 + 9,
        "numel": r.x[:1].numel(),
        "dtype": r.x.dtype,
        "guidance": 3.5 if full else 1.0,
        "with_x0": full,
        "with_mean": full,
        "t": optional(r.coef[:, 3].contiguous()),
        "time": 0.0 if full else 0.3,
        "normalize": 2 if full else 0,
        "clamp": optional(1.5),
        "clip_low": 0.1,
        "clip_high": 0.2,
        "kl_weight": 0.04,
        "reuse_v": False,
        "guard": full,
        "grad_loss": r.coef.new_full((), 0.7),
        "back": torch.stack((r.grad, r.advantages), 1),
        "grad_mean": optional(r.x_next.to(r.coef.dtype)),
        "mean_reduction": not full,
        "need_x": full,
        "need_v": True,
        "need_x_next": full,
        "need_v_uncond": full,
    }
    drawn = {"sde_step_": {"noise": None}}  # elsewhere the noise is given where all else is

    def of(op: str) -> tuple[Any, ...]:
        schema = getattr(torch.ops.sfgrpo, op).default._schema
        own = values | drawn.get(op, {})
        return tuple(own[argument.name] for argument in schema.arguments)

    return {op: of(op) for op in DEFINITIONS}


OPS = sorted(DEFINITIONS)
WRITTEN = {
    op: tuple(map(definition.record._fields.index, definition.written))
    for op, definition in DEFINITIONS.items()
    if definition.written
}
"""Op that works in place -> positions of the arguments it overwrites."""


def results_of(
    function: Callable[..., Any], name: str, args: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """What the op returns, then what it overwrote; works on copies of the latter."""
    written = [i for i in WRITTEN.get(name, ()) if args[i] is not None]
    args = tuple(a.clone() if i in written else a for i, a in enumerate(args))
    result = function(*args)
    if not isinstance(result, tuple):
        result = () if result is None else (result,)
    return (*result, *(args[i] for i in written))


def call(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The op through the dispatcher; always a tuple."""
    return results_of(getattr(torch.ops.sfgrpo, name), name, args)


def reference(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op's specification, always returning a tuple."""
    return lambda *args: results_of(REFERENCES[name], name, args)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of every bit: NaN equals itself, -0 differs from 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    integer = integers[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
