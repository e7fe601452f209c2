"""The ops as operators of PyTorch: registered whole, compilable, deterministic, served by C++."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sfgrpo import ops
from sfgrpo.ops._library import DEFINITIONS, announce, announced, define
from tests.support.ops.cases import (
    BF16,
    F32,
    F64,
    OPS,
    WRITTEN,
    arguments,
    call,
    poisoned,
    reference,
    rows,
    same_bits,
    threads,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", OPS)
def test_cpp_serves_the_cpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfgrpo::{name}", "CPU")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(name: str, full: bool) -> None:
    args = arguments(rows(), full)[name]
    differentiable = {"sde_logprob": (0, 1, 2), "tweedie": (0, 1), "policy_loss": (1,)}
    for index in differentiable.get(name, ()):
        args[index].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.sfgrpo, name).default, args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 9), (1, 4)])
def test_meta_shapes_are_the_real_ones(name: str, full: bool, shape: tuple[int, ...]) -> None:
    args = arguments(rows(3, shape, BF16, F32), full)[name]
    real = call(name, args)
    with FakeTensorMode() as mode:
        fake = call(name, tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [
        (t.shape, t.dtype, t.stride()) for t in real
    ]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("full", [False, True])
def test_strided_inputs(name: str, full: bool) -> None:
    """Transposed inputs: the same bits, contiguous results, in C++ and in the reference."""
    args = arguments(rows(3, (5, 130)), full)[name]
    strided = tuple(
        a.transpose(-1, -2).contiguous().transpose(-1, -2)
        if isinstance(a, Tensor) and a.ndim > 1
        else a
        for a in args
    )
    expected = call(name, args)
    written = len(WRITTEN.get(name, ()))  # these stand last and keep their strides
    for got in (call(name, strided), reference(name)(*strided)):
        assert all(tensor.is_contiguous() for tensor in got[: len(got) - written])
    for one, other in zip(call(name, strided), expected, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_threads_do_not_change_a_bit(name: str, full: bool, dtype: torch.dtype) -> None:
    args = arguments(rows(5, (3, 33_000), dtype, dtype), full)[name]
    with threads(1), poisoned():
        alone = call(name, args)
    with threads(2), poisoned():
        together = call(name, args)
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", sorted({*OPS} - {"gain_advantages", "gain_advantages_"}))
@pytest.mark.parametrize(
    ("batch", "shape", "dtype"), [(4, (3, 700), F32), (23, (90,), F32), (23, (90,), BF16)]
)
def test_batch_splits_do_not_change_a_bit(
    name: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A row's results are the same alone as among others; its weight, too, is given.

    Short rows share a block of 1,024 elements: eleven of 90, so that rows 10 and 11 are
    neighbours in two of them.
    """
    args = arguments(rows(batch, shape, dtype, dtype), full=True)[name]
    whole = call(name, args)
    for row in {0, 1, 10, 11, batch - 1} & {*range(batch)}:
        part = tuple(
            a[row : row + 1].contiguous() if isinstance(a, Tensor) and a.ndim > 0 else a
            for a in args
        )
        for one, other in zip(call(name, part), whole, strict=True):
            if other.ndim > 0:
                assert same_bits(one, other[row : row + 1])


def _everything(
    x: Tensor, v: Tensor, u: Tensor, coef: Tensor, ids: Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    """All public functions in one graph."""
    eps = ops.philox_normal((3, 5), seed=5, sample_ids=ids, step_ids=1)
    first, logp = ops.sde_step(x, v, coef, seed=5, sample_ids=ids, step_ids=2)
    second, _, x0_hat = ops.sde_step_x0(first, v, coef, noise=noise + eps, v_uncond=u, guidance=2.0)
    score = ops.sde_logprob(x, v, first, coef, v_uncond=u, guidance=2.0, reduction="sum")
    clean = ops.tweedie(x, v, 0.25)
    rewards = torch.stack((clean, x0_hat, second), dim=2).mean(3)
    advantages = ops.gain_advantages(rewards, mask=torch.tensor([True, False]))
    loss, stats = ops.policy_loss(
        x, v, first, coef, logp, advantages.mean((1, 2)), v_uncond=u, v_ref=x0_hat, kl_weight=0.1
    )
    return loss + score.sum() + clean.sum(), stats.ratio, second


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    r = rows()

    def run(function: Any) -> tuple[Tensor, ...]:
        v, u = r.v.clone().requires_grad_(), r.v_uncond.clone().requires_grad_()
        loss, ratio, second = function(r.x, v, u, r.coef, r.sample_ids, r.noise)
        loss.backward()
        assert v.grad is not None
        assert u.grad is not None
        return loss.detach(), ratio, second, v.grad, u.grad

    compiled = torch.compile(_everything, fullgraph=True, backend=backend)
    for one, other in zip(run(compiled), run(_everything), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _digests(capability: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ops.digests"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_instruction_sets_agree_to_the_bit() -> None:
    best, *others = (_digests(capability) for capability in ("avx512", "avx2", "default"))
    assert best["wrong zeros"] == "[]"
    assert len(best) == 8 * len(OPS) + 1
    for other in others:
        assert {case for case in best if other[case] != best[case]} == set()


def test_without_a_compiler_the_reference_serves_with_one_warning(tmp_path: Path) -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch\n"
        "    from sfgrpo import ops\n"
        "    x = torch.ones(1, 4)\n"
        "    print(float(ops.tweedie(x, x, 0.5).sum()))\n"
        "print([str(w.message) for w in caught if 'sfgrpo' in str(w.message)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    total, warned = done.stdout.strip().splitlines()
    assert total == "2.0"
    assert warned.count("plain PyTorch serves") == 1
    assert "compiler" in warned


def test_a_device_without_kernels_is_announced_once() -> None:
    announce.cache_clear()
    with FakeTensorMode() as mode:
        x = FakeTensor(mode, torch.empty(1, device="meta"), torch.device("mps"))
        with pytest.warns(RuntimeWarning, match="no fused kernels for device 'mps': plain PyTorch"):
            announced(ops.tweedie)(x, x, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            announced(ops.tweedie)(x, x, 0.5)


class Operands(NamedTuple):
    x: Tensor
    names: list[str]
    last: bool = False


def _nothing(o: Operands) -> None:
    return None


def test_a_record_that_no_schema_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without: got \('x',\), expected the last of"):
        define("refused", Operands, _nothing, without=("x",))
    with pytest.raises(TypeError, match=r"names: got type list\[str\], expected what a schema has"):
        define("refused", Operands, _nothing)
    assert "refused" not in DEFINITIONS
