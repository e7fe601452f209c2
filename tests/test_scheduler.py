"""The diffusers scheduler: the base class's ODE, and our SDEs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfgrpo import ops, sde
from sfgrpo.scheduler import FlowMatchSDEScheduler

stock: Any = diffusers  # its lazy exports are invisible to type checkers
Euler = stock.FlowMatchEulerDiscreteScheduler
SHAPES = [(3, 4, 6, 5), (3, 7, 8), (3, 4, 3, 4, 5)]  # images, packed tokens, video
DYNAMIC = {"use_dynamic_shifting": True}
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd3": ({"shift": 3.0}, {"num_inference_steps": 8}),
    "flux": (DYNAMIC, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.8}),
    "linear": ({**DYNAMIC, "time_shift_type": "linear"}, {"sigmas": [0.9, 0.5, 0.1], "mu": 1.7}),
    "qwen": ({**DYNAMIC, "shift_terminal": 0.02}, {"sigmas": [1.0, 0.6, 0.3], "mu": 0.7}),
    "timesteps": ({}, {"timesteps": [1000.0, 700.0], "sigmas": [0.9, 0.6]}),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, {"num_inference_steps": 5}),
    "mochi": ({"invert_sigmas": True}, {"sigmas": [1.0, 0.7, 0.2]}),
    "ends in zero": ({}, {"sigmas": [1.0, 0.5, 0.0]}),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(scheduler: Any, x: Tensor, times: dict[str, Any], **options: Any) -> Tensor:
    scheduler.set_timesteps(device="cpu", **times)
    for t in scheduler.timesteps:
        v = torch.sin(3 * x) + x * t / 1000
        x = scheduler.step(v, t, x, return_dict=False, **options)[0]
    return x


def ready(**config: Any) -> FlowMatchSDEScheduler:
    scheduler = FlowMatchSDEScheduler(shift=3.0, **config)
    scheduler.set_timesteps(6)
    return scheduler


@pytest.mark.parametrize(("sampler", "eta"), [("ode", 0.7), ("flow", 0.0), ("ddim", 0.0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_without_noise_it_is_the_base_class(name: str, sampler: str, eta: float) -> None:
    config, times = SCHEDULES[name]
    expected = run(Euler(**config), normal(*SHAPES[0]), times)
    actual = run(
        FlowMatchSDEScheduler(**config, sampler=sampler, eta=eta), normal(*SHAPES[0]), times
    )
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def test_renoise_is_stochastic_sampling_with_the_same_generators() -> None:
    base = Euler(shift=3.0, stochastic_sampling=True)
    ours = FlowMatchSDEScheduler.from_config(base.config)
    assert ours.config["sampler"] == "renoise"
    x, seeds, results = normal(*SHAPES[0]), [4, 5, 6], []
    for scheduler, rows in ((base, slice(3)), (ours, slice(3)), (ours, slice(1, 2))):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
        results.append(run(scheduler, x[rows], {"num_inference_steps": 5}, generator=generators))
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results[2], results[1][1:2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", sde.SAMPLERS)
def test_steps_follow_the_table(sampler: str, shape: tuple[int, ...]) -> None:
    scheduler = ready(sampler=sampler, seed=9)
    table = sde.coefficients(scheduler.sigmas, sampler, 0.7)
    for k, t in enumerate(scheduler.timesteps):
        x, v = normal(*shape, seed=2 * k), normal(*shape, seed=2 * k + 1)
        output: Any = scheduler.step(v, t, x)
        eps = ops.philox_normal(shape[1:], seed=9, sample_ids=torch.arange(3), step_ids=k)
        a, b, n, level = table[k].tolist()
        torch.testing.assert_close(output.prev_sample, a * x + b * v + n * eps)
        torch.testing.assert_close(output.pred_original_sample, x - level * v)
        logp = ops.sde_logprob(x, v, output.prev_sample, table[k].expand(3, 4))
        torch.testing.assert_close(output.log_prob, logp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtypes", ["fbf", "bff", "bbb", "hhh", "ddd"])
def test_the_wider_dtype_and_the_density_of_what_is_stored(dtypes: str) -> None:
    names = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16, "d": torch.float64}
    given, predicted, stored = (names[letter] for letter in dtypes)
    x, v = normal(*SHAPES[0]).to(given), normal(*SHAPES[0], seed=1).to(predicted)
    scheduler = ready()
    scheduler.set_begin_index(4)  # n = 0.004: in half precision rounding outweighs the noise
    output: Any = scheduler.step(v, 1.0, x)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == stored
    coef = sde.coefficients(scheduler.sigmas)[4].expand(3, 4).to(output.log_prob.dtype)
    logp = ops.sde_logprob(x.to(stored), v, output.prev_sample, coef)
    torch.testing.assert_close(output.log_prob, logp, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, times, scheduler = normal(*SHAPES[0]), {"num_inference_steps": 6}, FlowMatchSDEScheduler()
    usual = run(scheduler, x, times)
    scheduler.set_sample_ids([7, 2**40, 3])
    together = run(scheduler, x, times)
    scheduler.set_sample_ids(torch.tensor([2**40]))
    assert torch.equal(run(scheduler, x[1:2], times), together[1:2])
    with pytest.raises(ValueError, match=r"sample_ids: got shape \(1,\), expected \(3,\)"):
        run(scheduler, x, times)
    scheduler.set_sample_ids(None)
    scheduler.set_seed(1)
    other = run(scheduler, x, times)
    assert torch.equal(run(FlowMatchSDEScheduler.from_config(scheduler.config), x, times), other)
    assert len(torch.stack([usual, together, other]).unique(dim=0)) == 3
    with pytest.raises(ValueError, match="expected int64"):
        scheduler.set_sample_ids(torch.ones(3))


def test_deep_copies_draw_other_noise_and_the_same_in_every_call() -> None:
    scheduler, calls = FlowMatchSDEScheduler(sampler="cps"), []
    for _ in range(2):
        trio = [scheduler, copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
        calls.append(torch.cat([run(s, normal(1, 8), {"num_inference_steps": 3}) for s in trio]))
    assert torch.equal(calls[0], calls[1])
    assert len(calls[0].unique(dim=0)) == 3


class _Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = {*getattr(self, "names", ()), func.overloadpacket.__name__}
        return func(*args, **(kwargs or {}))


def test_begin_in_the_middle_and_never_wait_for_the_device() -> None:
    """Image-to-image: a step keeps the noise of its place in the schedule."""
    scheduler, x, v = ready(), normal(2, 8), normal(2, 8, seed=1)
    scheduler.set_begin_index(2)
    with _Calls() as calls, scheduler.record() as trajectory:
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(v, t, x)[0]
    waits = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_copy"}
    assert calls.names & {*waits, "arange"} == {"arange"}
    assert torch.equal(trajectory.sigmas, scheduler.sigmas[2:])
    assert torch.equal(trajectory.coefficients, sde.coefficients(scheduler.sigmas)[2:])
    alone = ready().step(v, scheduler.timesteps[2], trajectory.latents[:, 0])
    assert torch.equal(alone[0], trajectory.latents[:, 1])


def test_recording() -> None:
    scheduler, v, x = ready(), normal(2, 8, seed=1), normal(2, 8)
    with scheduler.record() as trajectory:
        with pytest.raises(RuntimeError, match="empty"):
            _ = trajectory.latents
        with pytest.raises(RuntimeError, match="already"), scheduler.record():
            pass
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(v, t, x)[0]
            if k == 2:
                x[:, :4] = 0  # as inpainting does
        with pytest.raises(ValueError, match="all 6 steps are done"):
            scheduler.step(v, 1.0, x)
        scheduler.set_timesteps(6)
        with pytest.raises(RuntimeError, match="second run"):
            scheduler.step(v, scheduler.timesteps[0], x)
    assert torch.equal(trajectory.latents[:, [0, -1]], torch.stack([normal(2, 8), x], 1))
    assert not trajectory.latents[:, 3, :4].any()
    assert trajectory.next_latents[:, 2, :4].all()
    for k, coef in enumerate(trajectory.coefficients):
        start, end = trajectory.latents[:, k], trajectory.next_latents[:, k]
        logp = ops.sde_logprob(start, v, end, coef.expand(2, 4))
        torch.testing.assert_close(trajectory.log_probs[:, k], logp, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(trajectory.clean[:, k], start - coef[3] * v)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: FlowMatchSDEScheduler(sampler="dimm"), "did you mean 'ddim'"),
        (lambda x: ready(eta=3.0), "the largest that fits"),
        (lambda x: FlowMatchSDEScheduler().set_timesteps(sigmas=[0.5, 0.7]), "fall strictly"),
        (lambda x: FlowMatchSDEScheduler().step(x, 1000.0, x), "set_timesteps first"),
        (lambda x: ready().step(x, 1000.0, x, per_token_timesteps=x), "per_token_timesteps"),
        (lambda x: ready().step(x, 3, x), "an integer"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(2, 8))


def test_configurations_of_other_schedulers(tmp_path: Path) -> None:
    wan = stock.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    heun = stock.FlowMatchHeunDiscreteScheduler(shift=5.0)
    for source in (wan, heun, stock.FlowMatchLCMScheduler(shift=5.0)):
        ours = FlowMatchSDEScheduler.from_config(source.config, sampler="cps")
        ours.save_pretrained(tmp_path)
        loaded: Any = FlowMatchSDEScheduler.from_pretrained(tmp_path)
        for scheduler in (ours, loaded, FlowMatchSDEScheduler.from_config(loaded.config)):
            assert (scheduler.config["shift"], scheduler.config["sampler"]) == (5.0, "cps")
        back = type(source).from_config(loaded.config).config
        assert all(back[key] == value for key, value in source.config.items() if key[0] != "_")
    for wrong in (stock.DDIMScheduler(), stock.FlowMatchLCMScheduler(scale_factors=[0.5])):
        with pytest.raises(ValueError, match="expected a FlowMatch"):
            FlowMatchSDEScheduler.from_config(wrong.config)
    with pytest.raises(ValueError, match="pass stochastic_sampling=False"):
        FlowMatchSDEScheduler.from_config(Euler(stochastic_sampling=True).config, sampler="ddim")
    # from_config would drop an argument that only a newer diffusers has.
    keys = FlowMatchSDEScheduler._get_init_keys
    assert keys(FlowMatchSDEScheduler) == keys(Euler) | {"sampler", "eta", "seed"}
