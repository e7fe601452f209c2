"""Bad arguments: the right exception, and a message that names the argument and both sides."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sfgrpo import ops
from tests.support.ops.cases import BF16, F32, F64, reference, rows

R = rows(3, (4,))
X, V, COEF, IDS = R.x, R.v, R.coef, R.sample_ids
DOUBLE = rows(3, (4,), F64, F64)


def _step(**changes: Any) -> Any:
    given = {"x": X, "v": V, "coef": COEF, "seed": 0, "sample_ids": IDS, "step_ids": 0}
    given |= changes
    return ops.sde_step(given.pop("x"), given.pop("v"), given.pop("coef"), **given)


def _score(**changes: Any) -> Any:
    given = {"x": X, "v": V, "x_next": R.x_next, "coef": COEF} | changes
    operands = [given.pop(name) for name in ("x", "v", "x_next", "coef")]
    return ops.sde_logprob(*operands, **given)


def _loss(**changes: Any) -> Any:
    given = {"x": X, "v": V, "x_next": R.x_next, "coef": COEF, "logp_old": R.logp_old}
    given |= {"advantages": R.advantages} | changes
    names = ("x", "v", "x_next", "coef", "logp_old", "advantages")
    operands = [given.pop(name) for name in names]
    return ops.policy_loss(*operands, **given)


def _normal(**changes: Any) -> Any:
    given = {"shape": (4,), "seed": 0, "sample_ids": IDS, "step_ids": 0} | changes
    return ops.philox_normal(given.pop("shape"), **given)


def _credit(rewards: Any = R.rewards, **options: Any) -> Any:
    return ops.gain_advantages(rewards, **options)


def _needs_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


NESTED = torch.nested.nested_tensor([X[0], X[1], X[2]], layout=torch.jagged)

TYPE_ERRORS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (_step, {"x": [1.0]}, "x: got list, expected a tensor"),
    (_step, {"x": torch.ones(3, 4, dtype=torch.int64)}, "x: got dtype torch.int64, expected"),
    (
        _step,
        {"x": X.to_sparse()},
        "x: got layout torch.sparse_coo, expected a dense tensor; pass x.t",
    ),
    (_score, {"x_next": R.x_next.to_sparse()}, "x_next: got layout torch.sparse_coo, expected"),
    (_loss, {"advantages": R.advantages.to_sparse()}, "advantages: got layout torch.sparse_coo"),
    (
        _loss,
        {"v": NESTED},
        "v: got a nested tensor, expected a dense one, whose rows have one size",
    ),
    (_normal, {"sample_ids": IDS.to_sparse()}, "sample_ids: got layout torch.sparse_coo, expected"),
    (_normal, {"step_ids": IDS.to_sparse()}, "step_ids: got layout torch.sparse_coo, expected a"),
    (_credit, {"rewards": R.rewards.to_sparse()}, "rewards: got layout torch.sparse_coo, expected"),
    (_step, {"v": DOUBLE.v}, "v: got dtype torch.float64 beside x in torch.float32"),
    (_step, {"coef": COEF.double()}, "coef: got dtype torch.float64, expected torch.float32"),
    (_step, {"sample_ids": IDS.int()}, "sample_ids: got dtype torch.int32, expected torch.int64"),
    (_step, {"sample_ids": 3}, "sample_ids: got int, expected an int64 tensor"),
    (_step, {"step_ids": 1.5}, "step_ids: got float, expected an int or an int64 tensor"),
    (_step, {"step_ids": IDS.int()}, "step_ids: got dtype torch.int32"),
    (_step, {"seed": 1.0}, "seed: got float, expected an int"),
    (_step, {"guidance": "4.5"}, "guidance: got str, expected a number"),
    (_score, {"x": DOUBLE.x, "v": DOUBLE.v, "x_next": DOUBLE.x_next}, "coef: got dtype"),
    (_loss, {"logp_old": R.logp_old.double()}, "logp_old: got dtype torch.float64, expected"),
    (_loss, {"advantages": 1.0}, "advantages: got float, expected a tensor"),
    (_loss, {"advantages": None}, "advantages: got NoneType, expected a tensor"),
    (_loss, {"clip_range": None}, "clip_range: got NoneType, expected a number"),
    (_normal, {"dtype": torch.int32}, "dtype: got torch.int32, expected float32"),
    (_credit, {"rewards": R.rewards.to(BF16)}, "rewards: got dtype torch.bfloat16, expected"),
    (_credit, {"rewards": [0.0]}, "rewards: got list, expected a tensor"),
    (_credit, {"mask": torch.ones(5)}, "mask: got dtype torch.float32, expected torch.bool"),
]
VALUE_ERRORS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (_step, {"x": torch.tensor(1.0)}, "x: got a scalar tensor, expected a leading batch"),
    (_step, {"v": V[:, :3]}, "v: got shape (3, 3), expected (3, 4) like x"),
    (_step, {"v_uncond": V[:2]}, "v_uncond: got shape (2, 4), expected (3, 4)"),
    (_step, {"v": V.to("meta")}, "v: got device meta, expected cpu"),
    (_step, {"coef": COEF[:, :3]}, "coef: got shape (3, 3), expected (3, 4)"),
    (_step, {"sample_ids": IDS[:2]}, "sample_ids: got shape (2,), expected (3,)"),
    (_step, {"step_ids": IDS[:2]}, "step_ids: got shape (2,), expected (3,)"),
    (_step, {"step_ids": 2**32}, "step_ids: got 4294967296, expected 0 <= step < 2**32"),
    (_step, {"seed": -1}, "seed: got -1, expected 0 <= seed < 2**63"),
    (_step, {"seed": None}, "noise: got None, expected noise or all of seed, sample_ids, step_ids"),
    (_step, {"guidance": float("nan")}, "guidance: got nan, expected a finite number"),
    (_score, {"reduction": "none"}, "reduction: got 'none', expected 'mean' or 'sum'"),
    (_score, {"coef": _needs_grad(COEF)}, "coef: got a tensor that requires grad"),
    (_loss, {"x": _needs_grad(X)}, "x: got a tensor that requires grad, expected none"),
    (_loss, {"advantages": _needs_grad(R.advantages)}, "advantages: got a tensor that requires"),
    (_loss, {"v_ref": _needs_grad(V)}, "v_ref: got a tensor that requires grad"),
    (_loss, {"clip_range": -0.1}, "clip_range: got -0.1, expected a finite number >= 0"),
    (_loss, {"kl_weight": -1.0}, "kl_weight: got -1.0, expected a finite number >= 0"),
    (_loss, {"kl_weight": 0.04}, "kl_weight: got 0.04 without v_ref, expected the reference's"),
    (_loss, {"weights": R.weights[:2]}, "weights: got shape (2,), expected (3,)"),
    (_loss, {"v_old": V[:2], "ratio": "guard"}, "v_old: got shape (2, 4), expected (3, 4)"),
    (_loss, {"v_old": V}, "v_old: got a tensor with ratio 'density', expected ratio 'guard'"),
    (_loss, {"v_old": _needs_grad(V), "ratio": "guard"}, "v_old: got a tensor that requires grad"),
    (_loss, {"ratio": "n"}, "ratio: got 'n', expected 'density' or 'guard'"),
    (
        _loss,
        {"ratio": "guard", "density": "unnormalised"},
        "ratio: got 'guard' with density 'unnormalised', expected 'gaussian'",
    ),
    (_normal, {"shape": (-1,)}, "shape: got (-1,), expected sizes >= 0"),
    (_normal, {"shape": (2**35,)}, "at most 2**34 elements"),
    (_normal, {"sample_ids": IDS[:, None]}, "sample_ids: got shape (3, 1), expected [B]"),
    (_credit, {"rewards": torch.ones(3, 4)}, "rewards: got shape (3, 4), expected [P, N, T + 1]"),
    (_credit, {"rewards": torch.ones(3, 4, 1)}, "rewards: got shape (3, 4, 1), expected"),
    (_credit, {"normalize": "z"}, "normalize: got 'z', expected one of ('joint',"),
    (_credit, {"mask": torch.ones(4, dtype=torch.bool)}, "mask: got shape (4,), expected (5,)"),
    (_credit, {"clamp": -1.0}, "clamp: got -1.0, expected a finite number >= 0"),
]
TWEEDIE = [
    (1.5, ValueError, "t: got 1.5, expected 0 <= t <= 1"),
    ("0.5", TypeError, "t: got str, expected a number"),
    (torch.ones(2), ValueError, "t: got shape (2,), expected (3,)"),
    (_needs_grad(torch.ones(3)), ValueError, "t: got a tensor that requires grad"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), TYPE_ERRORS)
def test_type_errors(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize(("function", "arguments", "message"), VALUE_ERRORS)
def test_value_errors(
    function: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize(("t", "error", "message"), TWEEDIE)
def test_tweedie_errors(t: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.tweedie(X, V, t)


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, float("nan")), (1, float("inf")), (2, -0.1), (2, float("nan")), (3, -0.1), (3, 1.5)],
)
def test_coefficients_are_checked_where_they_are_read(column: int, value: float) -> None:
    coef = COEF.clone()
    coef[1, column] = value
    pattern = r"coef: .*row 1 is .*expected finite values with n >= 0 and 0 <= t <= 1"
    plain = (R.x, R.v, R.x_next, coef)
    for call in (
        lambda: _step(coef=coef),
        lambda: _score(coef=coef),
        lambda: _loss(coef=coef),
        lambda: reference("sde_logprob")(*plain, None, 1.0, True, False),
    ):
        with pytest.raises(RuntimeError, match=pattern):
            call()


def test_data_are_checked_where_they_are_read() -> None:
    bad = R.rewards.clone()
    bad[0, 1, 2] = float("nan")
    for call in (lambda: _credit(bad), lambda: reference("gain_advantages")(bad, 0, None, None)):
        with pytest.raises(RuntimeError, match="rewards: got a value that is not finite"):
            call()
    times = torch.tensor([0.5, 2.0, 0.5])
    for call in (lambda: ops.tweedie(X, V, times), lambda: reference("tweedie")(X, V, times, 0.0)):
        with pytest.raises(RuntimeError, match=r"t of row 1 is 2.*expected 0 <= t <= 1"):
            call()


@pytest.mark.parametrize(
    "args",
    [
        (X, V[:2], COEF, 0, IDS, 0, IDS, None, 1.0, None, False, False),
        (X, V, COEF[:2], 0, IDS, 0, IDS, None, 1.0, None, False, False),
        (X, V, COEF, 0, IDS[:2], 0, IDS, None, 1.0, None, False, False),
        (X, V, COEF, 0, IDS, 0, IDS.to(F32), None, 1.0, None, False, False),
        (X, V, COEF, 0, None, 0, None, None, 1.0, None, False, False),
        (X, DOUBLE.v, COEF, 0, IDS, 0, IDS, None, 1.0, None, False, False),
    ],
)
def test_raw_ops_do_not_read_out_of_bounds(args: tuple[Any, ...]) -> None:
    """Called behind the public function's back the C++ kernel still refuses."""
    with pytest.raises(RuntimeError, match=r"expected|needed|number of elements"):
        torch.ops.sfgrpo.sde_step(*args)


def test_numpy_scalars_and_lists_are_numbers() -> None:
    """As settings arrive out of YAML, JSON and numpy."""
    options: dict[str, Any] = {
        "clip_range": [np.float32(0.25), np.float64(0.5)],
        "guidance": np.int64(2),
    }
    expected = _loss(clip_range=(0.25, 0.5), guidance=2)
    assert torch.equal(_loss(**options).loss, expected.loss)
    ids = torch.arange(2)
    counters: Any = {"seed": np.int64(5), "step_ids": np.uint32(7)}
    noise = ops.philox_normal((2, 3), sample_ids=ids, **counters)
    assert torch.equal(noise, ops.philox_normal((2, 3), seed=5, sample_ids=ids, step_ids=7))
    with pytest.raises(TypeError, match="guidance: got bool, expected a number"):
        _loss(guidance=np.bool_(True))
    with pytest.raises(ValueError, match="clip_range: got 3 numbers, expected one or"):
        _loss(clip_range=[0.1, 0.2, 0.3])
