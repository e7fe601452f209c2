"""What only a GPU can show: no waiting host, one kernel per op, graphs, memory, very long rows.

Part of `python -m tests.ops.device_check`; each check raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sfgrpo import ops
from sfgrpo.ops.philox import box_muller, philox4x32
from tests.support.ops import cases

LATENT = (16, 64, 64)
MANY = 2**31 + 2**20
"""Elements of a row whose offsets do not fit into 32 bits."""


def _rows(device: torch.device, batch: int = 4, shape: tuple[int, ...] = LATENT) -> cases.Rows:
    r = cases.rows(batch, shape, torch.float32, torch.bfloat16)
    return r.replace(lambda tensor: tensor.to(device))


def _every_call(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Op (and form) -> a call through the dispatcher, on rows of one and of many programs."""
    calls: dict[str, Callable[[], Any]] = {}
    for label, shape in (("long", LATENT), ("short", (7, 8))):
        r = _rows(device, shape=shape)
        for full in (False, True):
            for op, arguments in cases.arguments(r, full).items():
                name = f"{op}, {label}{', all operands' if full else ''}"
                function = getattr(torch.ops.sfgrpo, op)
                calls[name] = lambda f=function, a=arguments: f(*a)
    return calls


def host_never_waits(device: torch.device) -> None:
    calls = _every_call(device)
    r = _rows(device)
    v = r.v.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
        _denoise_and_score(r, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_kernel_per_op(device: torch.device) -> None:
    calls = _every_call(device)
    for call in calls.values():  # compiles, and clears the counters once
        call()
    torch.cuda.synchronize()
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in seen.events() or () if e.device_type.name == "CUDA"]
        assert len(kernels) == 1, f"{name}: {kernels}"


def _denoise_and_score(r: cases.Rows, v: Tensor) -> tuple[Tensor, ...]:
    """A whole step of the method: sample, clean estimate, loss and its gradient."""
    identity = {"seed": 1, "sample_ids": r.sample_ids, "step_ids": 3}
    x_next, logp, clean = ops.sde_step_x0(r.x, v.detach(), r.coef, **identity)
    loss, stats = ops.policy_loss(
        r.x, v, x_next, r.coef, logp + 0.1 * r.logp_old, r.advantages, v_ref=r.v_ref,
        clip_range=0.2, kl_weight=0.1,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, v)
    return x_next, logp, clean, loss.detach(), *stats, grad


def _same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(cases.same_bits(g.cpu(), w.cpu()) for g, w in zip(got, want, strict=True))


def graphs_replay_with_new_inputs(device: torch.device) -> None:
    """Also beside eager calls on another stream: their counters are not the graph's."""
    r = _rows(device)
    v = r.v.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _denoise_and_score(r, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _denoise_and_score(r, v)
    for seed in range(1, 4):
        fresh = cases.rows(4, LATENT, torch.float32, torch.bfloat16, seed)
        with torch.no_grad():
            for name in ("x", "v_ref", "coef", "advantages", "sample_ids"):
                getattr(r, name).copy_(getattr(fresh, name))
            v.copy_(fresh.v)
        want = _denoise_and_score(r, v)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(side):
            beside = _denoise_and_score(r, v)
        torch.cuda.synchronize()
        assert _same(captured, want)
        assert _same(beside, want)


def compiled_into_graphs(device: torch.device) -> None:
    r = _rows(device)
    compiled = torch.compile(_denoise_and_score_of_tensors, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        fresh = cases.rows(4, LATENT, torch.float32, torch.bfloat16, seed)
        operands = (
            *(getattr(fresh, n).to(device) for n in ("x", "x_next", "coef", "advantages")),
            r.sample_ids,
        )
        v, again = (fresh.v.to(device).requires_grad_() for _ in range(2))
        with_v: Any = (*operands, v)
        with_again: Any = (*operands, again)
        torch.compiler.cudagraph_mark_step_begin()
        loss, clean = compiled(*with_v)
        loss.backward()
        want, want_clean = _denoise_and_score_of_tensors(*with_again)
        want.backward()
        assert v.grad is not None
        assert again.grad is not None
        assert _same((loss, clean, v.grad), (want, want_clean, again.grad))


def _denoise_and_score_of_tensors(
    x: Tensor, x_next: Tensor, coef: Tensor, advantages: Tensor, ids: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    identity = {"seed": 1, "sample_ids": ids, "step_ids": 3}
    _, logp, clean = ops.sde_step_x0(x, v.detach(), coef, **identity)
    loss, _ = ops.policy_loss(x, v, x_next, coef, logp, advantages, clip_range=0.2)
    return loss, clean


def bits_repeat(device: torch.device) -> None:
    """Two rows of two million elements, 4,096 programs: the same bits in each of 200 runs, on two
    streams at once. A share read too early would show."""
    r = _rows(device, 2, (2**21,))
    side = torch.cuda.Stream()
    score = (r.x, r.v, r.x_next, r.coef)
    want = ops.sde_logprob(*score).clone()
    torch.cuda.synchronize()
    got = []
    for _ in range(200):
        got.append(ops.sde_logprob(*score))
        with torch.cuda.stream(side):
            got.append(ops.sde_logprob(*score))
    torch.cuda.synchronize()
    assert all(torch.equal(logp, want) for logp in got)
    alone = ops.sde_logprob(*(tensor[1:] for tensor in score))
    assert torch.equal(alone[0], want[1])


def loss_allocates_only_the_gradient(device: torch.device) -> None:
    r = _rows(device, 16, (64, 64, 64))
    size = r.v.numel() * r.v.element_size()
    for reuse_v, allowed in ((False, size), (True, 0)):
        v = r.v.clone().requires_grad_() * 1.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = ops.policy_loss(
            r.x, v, r.x_next, r.coef, r.logp_old, r.advantages, v_ref=r.v_ref, reuse_v=reuse_v
        )
        grad = torch.autograd.grad(loss, v)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= allowed + 0.02 * size, f"reuse_v={reuse_v}: {extra} bytes, latent {size}"
        del grad


def rows_beyond_32_bits(device: torch.device) -> None:
    """The noise at the end of such a row, and the density of a row with a known answer."""
    ids = torch.tensor([2**40 + 5], device=device)
    noise = ops.philox_normal(
        (MANY,), seed=9, sample_ids=ids, step_ids=2, dtype=torch.bfloat16
    )[0, -4096:]  # fmt: skip
    quads = torch.arange(MANY // 4 - 1024, MANY // 4)
    words = philox4x32((quads, *map(torch.tensor, (2, 5, 2**8))), (9, 0))
    exact = torch.stack((*box_muller(*words[:2]), *box_muller(*words[2:])), 1).flatten()
    assert torch.equal(noise.cpu(), exact.bfloat16())
    del noise
    x = torch.zeros(1, MANY, dtype=torch.bfloat16, device=device)
    coef = torch.tensor([[1.0, -0.1, 0.5, 0.5]], device=device)
    x_next = x.clone()
    x_next[0, 2**31 :] = 1.0
    logp = ops.sde_logprob(x, x, x_next, coef)
    known = -(2**20 / MANY) / (2 * 0.25) - torch.log(torch.tensor(0.5)) - 0.9189385332046727
    assert abs(float(logp) - float(known)) < 1e-6 * abs(float(known))
    ops.tweedie_(x, x_next, 0.5)
    assert x_next[0, 2**31 - 1] == 0
    assert bool((x_next[0, 2**31 :] == -0.5).all())


CHECKS: dict[str, tuple[Callable[[torch.device], None], int]] = {
    "host never waits": (host_never_waits, 0),
    "one kernel per op": (one_kernel_per_op, 0),
    "CUDA graphs replay with new inputs": (graphs_replay_with_new_inputs, 0),
    'torch.compile(mode="reduce-overhead")': (compiled_into_graphs, 0),
    "bits repeat": (bits_repeat, 0),
    "loss allocates only the gradient": (loss_allocates_only_the_gradient, 0),
    "rows beyond 32 bits": (rows_beyond_32_bits, 24 * 2**30),
}
"""Name -> check and the bytes of device memory that it needs."""
