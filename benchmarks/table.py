"""The benchmark table: one row per op, its contenders, its operands and the bytes it must move.

Adding an op is adding a row to ``TABLE`` (and its published form to ``published.py``).  Latents
are 16 x (16, 64, 64), a batch of Stable Diffusion 3.5's at 512 pixels: 2^20 elements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from sfgrpo import ops, sde

BATCH, LATENT = 16, (16, 64, 64)
SIGMAS = (1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0)
STEP, ETA, CLIP, BETA = 4, 0.7, 1e-4, 0.04

Operands = dict[str, Any]
Contender = Callable[[Operands, Tensor | None], tuple[Tensor, ...]]
"""Runs on the operands; with the given noise, or with noise of its own where that is None."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One op of the table."""

    contenders: dict[str, Contender]
    """"published" is the baseline; "sfgrpo" is ours; "compiled" is torch.compile of "affine"."""

    traffic: Callable[[Operands], int]
    """Bytes read and written at least."""

    tolerance: float = 1e-4
    """Largest difference of the contenders' results, relative to the largest value."""

    random: bool = False
    """Whether results are noise and nothing can be compared."""


def operands(device: torch.device, v_dtype: torch.dtype = torch.float32) -> Operands:
    """One Flow-SDE step of a batch, in Flow-GRPO's terms and in ours."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, noise = normal(BATCH, *LATENT), normal(BATCH, *LATENT)
    v, v_ref = (normal(BATCH, *LATENT).to(v_dtype) for _ in range(2))
    coef = sde.coefficients(SIGMAS, "flow", ETA)[STEP].repeat(BATCH, 1)
    x_next, logp_old = ops.sde_step(x, v, coef, noise=noise)
    sigma = torch.full((BATCH, 1, 1, 1), SIGMAS[STEP])
    tensors = {
        "x": x,
        "v": v,
        "v_ref": v_ref,
        "coef": coef,
        "noise": noise,
        "x_next": x_next,
        "logp_old": logp_old,
        "advantages": normal(BATCH),
        "sample_ids": torch.arange(BATCH),
        "times": sigma.reshape(-1),
        "sigma": sigma,
        "sigma_next": torch.full_like(sigma, SIGMAS[STEP + 1]),
        "rewards": normal(48, 24, 11),
    }
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, "eta": ETA, "clip": CLIP, "beta": BETA}


def _affine_step(o: Operands, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eager PyTorch given our coefficient table: fewer operations than published code."""
    a, b, n, _ = o["coef"].reshape(-1, 4, 1, 1, 1).unbind(1)
    mean = a * o["x"] + b * o["v"].float()
    x_next = mean + n * (torch.randn_like(mean) if noise is None else noise)
    square = (x_next - mean).square().mean(dim=(1, 2, 3))
    n = n.reshape(-1)
    return x_next, -square / (2 * n * n) - n.log() - 0.9189385332


def _step(o: Operands, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.sde_step(
        o["x"], o["v"], o["coef"], seed=1, sample_ids=o["sample_ids"], step_ids=2, noise=noise
    )


def _logprob(o: Operands, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    v = o["v"].detach().requires_grad_()
    logp = ops.sde_logprob(o["x"], v, o["x_next"], o["coef"])
    (grad,) = torch.autograd.grad(logp.sum(), v)
    return logp.detach(), grad


def _policy(o: Operands, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    v = o["v"].detach().requires_grad_()
    loss = ops.policy_loss(
        o["x"], v, o["x_next"], o["coef"], o["logp_old"], o["advantages"], v_ref=o["v_ref"],
        clip_range=o["clip"], kl_weight=o["beta"],
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, v)
    return loss.detach(), grad


def _normals(o: Operands, noise: Tensor | None) -> tuple[Tensor]:
    return (ops.philox_normal(LATENT, seed=1, sample_ids=o["sample_ids"], step_ids=2),)


def _bytes(*names: str) -> Callable[[Operands], int]:
    return lambda o: sum(o[name].numel() * o[name].element_size() for name in names)


TABLE = {
    "sde_step": Row(
        contenders={
            "published": published.sde_step,
            "affine": _affine_step,
            "compiled": _affine_step,
            "sfgrpo": _step,
        },
        traffic=_bytes("x", "v", "x_next"),
    ),
    "sde_logprob with gradient": Row(
        contenders={"published": published.sde_logprob, "sfgrpo": _logprob},
        traffic=_bytes("x", "v", "x_next", "x", "v", "x_next", "v"),
    ),
    "policy_loss with gradient": Row(
        contenders={"published": published.policy_loss, "sfgrpo": _policy},
        traffic=_bytes("x", "v", "x_next", "v_ref", "x", "v", "x_next", "v_ref", "v"),
    ),
    "tweedie": Row(
        contenders={
            "published": published.tweedie,
            "sfgrpo": lambda o, noise: (ops.tweedie(o["x"], o["v"], o["times"]),),
        },
        traffic=_bytes("x", "v", "x"),
    ),
    "gain_advantages": Row(
        contenders={
            "published": published.gain_advantages,
            "sfgrpo": lambda o, noise: (ops.gain_advantages(o["rewards"]),),
        },
        traffic=_bytes("rewards", "rewards"),
    ),
    "philox_normal": Row(
        contenders={"published": published.philox_normal, "sfgrpo": _normals},
        traffic=_bytes("x"),
        random=True,
    ),
}


def device() -> torch.device:
    """This machine's accelerator, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def runner(row: Row, name: str, o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    """A contender that is checked against the published form, compiled if it is to be, warm."""
    contender = row.contenders[name]
    if name == "compiled":
        torch._dynamo.reset()  # generated code fixes the number of threads
        contender = torch.compile(contender, fullgraph=True)
    if not row.random:
        expected = row.contenders["published"](o, o["noise"])
        for got, want in zip(contender(o, o["noise"]), expected, strict=True):
            difference = float((got.float() - want.float()).abs().max())
            scale = float(want.float().abs().max())
            if not difference <= row.tolerance * scale:
                raise AssertionError(f"{name}: differs by {difference:.3g} (scale {scale:.3g})")

    def run() -> tuple[Tensor, ...]:
        results = contender(o, None)
        if o["x"].device.type != "cpu":
            torch.accelerator.synchronize()
        return results

    run()
    return run


def copy_seconds(number_of_bytes: int, where: torch.device, rounds: int = 30) -> float:
    """Fastest plain copy that moves so many bytes: reads half of them and writes half."""
    source = torch.zeros(max(number_of_bytes // 8, 1), device=where)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        if where.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
