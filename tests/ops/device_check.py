"""Runs the ops as users call them, on this machine's accelerator, against the references.

`python -m tests.ops.device_check` checks the compiled kernels on a real GPU (which the test suite
cannot do in its own process, since it interprets Triton) and prints one line per check; without a
GPU it checks the CPU's kernels and skips what only a GPU can show (`device_graph.py`, in
tests/support/ops).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sfgrpo import ops
from sfgrpo.ops._library import REFERENCES
from sfgrpo.ops.gain_advantages import NORMALIZATIONS
from tests.support.ops import device_graph, zeros
from tests.support.ops.triton_support import coefficients, double, logp_error, residual_error, rows

BATCH = 6
SIZES = (1, 56, 1023, 1024, 10007, 65536)


def _noise(device: torch.device, row_elements: int) -> bool:
    ids, steps = torch.arange(BATCH) * 2**31, torch.arange(BATCH)
    got = ops.philox_normal(
        (row_elements,), seed=2**40 + 17, sample_ids=ids.to(device), step_ids=steps.to(device)
    )
    exact = REFERENCES["philox_normal"](row_elements, 2**40 + 17, ids, 0, steps, torch.float32)
    return torch.equal(got.cpu().view(torch.int32), exact.view(torch.int32))


def _zeros(device: torch.device) -> bool:
    got = ops.philox_normal(
        (zeros.ELEMENTS,), seed=0, sample_ids=zeros.SAMPLES.to(device), step_ids=0
    )
    x, v, x_next, coef = (tensor.to(device) for tensor in _latents(56))
    stats = ops.policy_loss(x, v, x_next, coef, coef[:, 0], 0 * coef[:, 0]).stats
    return not zeros.wrong_zeros(got) and torch.equal(stats.surrogate.signbit(), coef[:, 2] > 0)


def _latents(row_elements: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, coef = rows(BATCH, row_elements), coefficients(BATCH, noise_free=(2,))
    v = rows(BATCH, row_elements, torch.bfloat16, seed=1)
    x_next = coef[:, 0:1] * x + coef[:, 2:3] * rows(BATCH, row_elements, seed=3)
    return x, v, x_next, coef


def _step(device: torch.device, row_elements: int) -> bool:
    x, v, _, coef = _latents(row_elements)
    ids = torch.arange(BATCH, device=device)
    x_next, logp, x0_hat = ops.sde_step_x0(
        x.to(device), v.to(device), coef.to(device), seed=3, sample_ids=ids, step_ids=4
    )
    residual, bound = residual_error(x, v, x_next.cpu(), coef, None, 1.0)
    noise = REFERENCES["philox_normal"](row_elements, 3, ids.cpu(), 4, None, torch.float32)
    step_error = (residual - coef[:, 2:3].double() * noise).abs()
    logp_exact, _ = REFERENCES["sde_logprob"](
        *double(x, v, x_next.cpu(), coef, None, 1.0, True, False)
    )
    x0_exact = REFERENCES["tweedie"](*double(x, v, coef[:, 3], 0.0))
    return bool(
        (step_error <= bound).all()
        and ((x0_hat.cpu() - x0_exact).abs() <= bound + 8e-7 * v.abs()).all()
        and ((logp.cpu() - logp_exact).abs() <= logp_error(residual, bound, coef[:, 2])).all()
    )


def _gradient(device: torch.device, row_elements: int, ratio: str) -> bool:
    x, v, x_next, coef = _latents(row_elements)
    v_uncond, v_ref = rows(BATCH, row_elements, seed=5), rows(BATCH, row_elements, seed=6)
    v_old = v_uncond + 0.1 * v_ref if ratio == "guard, re-centred" else None
    guard = ratio != "density"
    score = double(x, v, x_next, coef, v_uncond, 1.5, True, False)
    logp_old = REFERENCES["sde_logprob"](*score)[0].float()
    advantages = torch.linspace(-1, 1, BATCH)
    leaves = [tensor.to(device).detach().requires_grad_() for tensor in (v, v_uncond)]
    loss = ops.policy_loss(
        x.to(device), leaves[0], x_next.to(device), coef.to(device), logp_old.to(device),
        advantages.to(device), v_uncond=leaves[1], guidance=1.5, v_ref=v_ref.to(device),
        clip_range=0.2, kl_weight=0.04, ratio="guard" if guard else "density",
        v_old=None if v_old is None else v_old.to(device),
    ).loss  # fmt: skip
    loss.backward()
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in (v, v_uncond)]
    x, x_next, coef, logp_old, advantages, v_ref = double(
        x, x_next, coef, logp_old, advantages, v_ref
    )
    exact, _, _ = REFERENCES["policy_loss"](
        x, exact_leaves[0], x_next, coef, logp_old, advantages, exact_leaves[1], 1.5, v_ref,
        0.2, 0.2, 0.04, None, None, False, guard, None if v_old is None else v_old.double(),
    )  # fmt: skip
    exact.backward()
    close = bool((loss.cpu() - exact).abs() <= 1e-4 * exact.abs() + 1e-4)
    for leaf, exact_leaf in zip(leaves, exact_leaves, strict=True):
        assert leaf.grad is not None
        assert exact_leaf.grad is not None
        scale = exact_leaf.grad.abs().max()
        rounding = 2 * torch.finfo(leaf.dtype).eps + 1e-4
        close &= bool(((leaf.grad.cpu() - exact_leaf.grad).abs() <= rounding * scale).all())
    return close


def _credit(device: torch.device) -> bool:
    rewards = rows(3, 24 * 11).reshape(3, 24, 11)
    close = True
    for index, name in enumerate(NORMALIZATIONS):
        got = ops.gain_advantages(rewards.to(device), normalize=name).cpu()
        exact = REFERENCES["gain_advantages"](rewards, index, None, 5.0)
        close &= bool(((got - exact).abs() <= 4e-6 * (exact.abs() + 1)).all())
    return close


def _in_place(device: torch.device, row_elements: int) -> bool:
    """The ops in place have the bits of those that allocate; a policy's ratio to itself is 1."""
    x, v, x_next, coef = (tensor.to(device) for tensor in _latents(row_elements))
    noise = {"seed": 3, "sample_ids": torch.arange(BATCH, device=device), "step_ids": 4}
    want = ops.sde_step(x, v, coef, **noise)
    clean = ops.tweedie(x, v.float(), 0.3)
    same = torch.equal(clean, ops.tweedie_(x, v.float(), 0.3))
    row = torch.ones(BATCH, device=device)
    grads = []
    for reuse_v in (False, True):
        velocity = v.clone().requires_grad_() * 1.0
        loss, stats = ops.policy_loss(x, velocity, x_next, coef, None, row, reuse_v=reuse_v)
        same &= bool((stats.ratio == 1).all())
        grads += torch.autograd.grad(loss, velocity)
    got = ops.sde_step_(x, v, coef, **noise)
    return same and torch.equal(*grads) and all(map(torch.equal, got, want))


def _passes(check: Callable[[], bool | None]) -> bool:
    try:
        return check() is not False
    except Exception:  # whatever it is: shown, counted as a failure, and the others still run
        traceback.print_exc()
        return False


def main() -> int:
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    device = accelerator or torch.device("cpu")
    print(f"device {device}, torch {torch.__version__}")
    checks: dict[str, Callable[[], bool | None]] = {
        "advantages": partial(_credit, device),
        "signs of zeros": partial(_zeros, device),
    }
    for size in SIZES:
        checks[f"noise bits, D = {size}"] = partial(_noise, device, size)
        checks[f"step, D = {size}"] = partial(_step, device, size)
        for ratio in ("density", "guard", "guard, re-centred"):
            name = f"loss and gradient, ratio {ratio}, D = {size}"
            checks[name] = partial(_gradient, device, size, ratio)
        checks[f"in place, D = {size}"] = partial(_in_place, device, size)
    skipped = []
    for name, (check, memory) in device_graph.CHECKS.items():
        if device.type == "cuda" and torch.cuda.mem_get_info()[0] >= memory:
            checks[name] = partial(check, device)
        else:
            skipped.append(name)
    wrong = 0
    for name, check in checks.items():
        good = _passes(check)
        wrong += not good
        print(f"{'ok' if good else 'WRONG':8} {name}", flush=True)
    for name in skipped:
        print(f"{'skipped':8} {name}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
