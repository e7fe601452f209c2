"""The ops of this package, called with the operands of the table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.ops.operands import SEED, STEP_ID, Rewards, Transition
from sfgrpo import ops


def _noise(o: Transition) -> dict[str, Any]:
    if o.noise is not None:
        return {"noise": o.noise}
    return {"seed": SEED, "sample_ids": o.sample_ids, "step_ids": STEP_ID}


def sde_step(o: Transition) -> tuple[Tensor, Tensor]:
    return ops.sde_step(o.x, o.v, o.coef, **_noise(o))


def sde_step_(o: Transition) -> tuple[Tensor, Tensor]:
    return ops.sde_step_(o.x, o.v, o.coef, **_noise(o))


def sde_step_x0(o: Transition) -> tuple[Tensor, Tensor, Tensor]:
    return ops.sde_step_x0(o.x, o.v, o.coef, **_noise(o))


def sde_logprob(o: Transition) -> tuple[Tensor]:
    return (ops.sde_logprob(o.x, o.v, o.x_next, o.coef),)


def policy_loss(o: Transition, reuse_v: bool = False) -> tuple[Tensor]:
    result = ops.policy_loss(
        o.x,
        o.v,
        o.x_next,
        o.coef,
        o.logp_old,
        o.advantages,
        v_ref=o.v_ref,
        clip_range=o.clip,
        kl_weight=o.beta,
        reuse_v=reuse_v,
    )
    return (result.loss,)


def policy_loss_reusing_v(o: Transition) -> tuple[Tensor]:
    return policy_loss(o, reuse_v=True)


def tweedie(o: Transition) -> tuple[Tensor]:
    return (ops.tweedie(o.x, o.v, o.times),)


def tweedie_(o: Transition) -> tuple[Tensor]:
    return (ops.tweedie_(o.x, o.v, o.times),)


def gain_advantages(o: Rewards) -> tuple[Tensor]:
    return (ops.gain_advantages(o.rewards),)


def gain_advantages_(o: Rewards) -> tuple[Tensor]:
    return (ops.gain_advantages_(o.rewards),)


def philox_normal(o: Transition) -> tuple[Tensor]:
    return (
        ops.philox_normal(
            tuple(o.x.shape[1:]), seed=SEED, sample_ids=o.sample_ids, step_ids=STEP_ID
        ),
    )
