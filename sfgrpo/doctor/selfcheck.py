"""Which backend serves each op on each device, and whether it agrees with the reference.

The dispatcher is asked, not the package: a C++ library that failed to load shows as "reference".
The check calls the ops as users do, forward and backward, and again with every op of the namespace
replaced by its plain-PyTorch reference on the CPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES

BACKENDS = {"CPU": "C++", "CUDA": "Triton", "XPU": "Triton"}
TOLERANCE = 2e-5
"""Of the results' own scale: sums over elements are taken in different orders."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One op on one device."""

    op: str
    backend: str
    error: float | None
    """Largest difference from the reference, relative to its largest value; None if not called."""
    failure: str = ""
    """What the call raised."""

    @property
    def good(self) -> bool:
        return not self.failure and (self.error is None or self.error <= TOLERANCE)


def backend(op: str, device: torch.device) -> str:
    """What serves `op` on `device`: "C++", "Triton" or "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device.type, "")
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"sfgrpo::{op}", key):
        return BACKENDS[key]
    return "reference"


def cpp_library() -> str:
    """Where the C++ kernels come from."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sfgrpo::sde_step", "CPU"):
        return "not loaded; plain PyTorch serves the CPU"
    spec = importlib.util.find_spec("sfgrpo")
    assert spec is not None
    assert spec.origin is not None
    built_in = list(Path(spec.origin).parent.glob("_C.*so"))
    return "built into the package" if built_in else "compiled on this machine at first use"


class Spy(TorchDispatchMode):
    """Notes the results of the namespace's ops; `references` replaces the ops."""

    def __init__(self, *, references: bool) -> None:
        super().__init__()
        self.references = references
        self.results: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "sfgrpo":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("sfgrpo::")
        result = (REFERENCES[name] if self.references else func)(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in pairs if argument.is_write]
        tensors = [t for t in (*outputs, *written) if isinstance(t, Tensor)]
        self.results.setdefault(name, []).extend(t.detach().clone() for t in tensors)
        return result


def _exercise(device: torch.device) -> None:
    """Call every op once; backwards by autograd."""

    def random(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(device)

    x, v, v_ref, noise = (random(3, 4, 17, 15, seed=seed) for seed in range(4))
    coef = torch.tensor([[0.9, -0.1, 0.3, 0.8], [0.95, -0.2, 0.5, 0.5], [1.0, -0.1, 0.0, 0.1]])
    coef, ids = coef.to(device), torch.arange(3, device=device)
    noisy = {"seed": 1, "sample_ids": ids, "step_ids": 2}
    ops.philox_normal((4, 17), **noisy)
    ops.sde_step(x, v, coef, **noisy)
    ops.sde_step_x0(x, v, coef, v_uncond=v_ref, guidance=3.0, **noisy)
    ops.sde_step_(x.clone(), v, coef, **noisy)
    ops.tweedie(x, v, coef[:, 3].contiguous())
    ops.tweedie_(x.clone(), v, 0.5)
    rewards = random(2, 6, 5, seed=9)
    ops.gain_advantages(rewards)
    ops.gain_advantages_(rewards.clone())
    x_next = 0.9 * x - 0.1 * v + 0.3 * noise
    leaf = v.clone().requires_grad_()
    ops.sde_logprob(x, leaf, x_next, coef).sum().backward()
    for reuse in (False, True):
        leaf = v.clone().requires_grad_()
        ops.policy_loss(
            x, leaf * 1.0, x_next, coef, torch.full_like(coef[:, 0], -0.5), coef[:, 3].contiguous(),
            v_ref=v_ref, clip_range=0.5, kl_weight=0.1, reuse_v=reuse,
        ).loss.backward()  # fmt: skip


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest expected value of each tensor."""
    errors = [
        float((a.cpu() - b.cpu()).abs().max() / b.cpu().abs().max().clamp(min=1e-9))
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    ]
    return float(torch.tensor([0.0, *errors]).max())  # a NaN survives, unlike in Python's max


def _recorded(device: torch.device, *, references: bool) -> tuple[dict[str, list[Tensor]], str]:
    with Spy(references=references) as spy:
        try:
            _exercise(device)
        except Exception as error:  # whatever a compiler or a driver may raise is the finding
            return spy.results, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return spy.results, ""


def check(device: torch.device) -> list[Checked]:
    """Every op of the namespace on `device`."""
    expected, _ = _recorded(torch.device("cpu"), references=True)
    found, failure = _recorded(device, references=False)
    return [
        Checked(
            op=name,
            backend=backend(name, device),
            error=_error(found[name], expected[name]) if name in found else None,
            failure="" if name in found else failure,
        )
        for name in sorted(REFERENCES)
    ]
