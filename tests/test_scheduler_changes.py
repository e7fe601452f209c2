"""The scheduler where users change it, copy it, or set PyTorch's defaults."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfgrpo import sde
from sfgrpo.scheduler import FlowMatchSDEScheduler

stock: Any = diffusers  # its lazy exports are invisible to type checkers
Euler = stock.FlowMatchEulerDiscreteScheduler


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def denoise(scheduler: Any, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x), t, x, return_dict=False)[0]
    return x


def ready(**config: Any) -> FlowMatchSDEScheduler:
    scheduler = FlowMatchSDEScheduler(shift=3.0, **config)
    scheduler.set_timesteps(6)
    return scheduler


@pytest.mark.parametrize("inference", [False, True])
def test_sigmas_that_are_changed_after_set_timesteps_count(inference: bool) -> None:
    for change in ("replace", "overwrite"):
        finals = []
        with torch.inference_mode(inference):
            for scheduler in (Euler(shift=3.0), FlowMatchSDEScheduler(shift=3.0, sampler="ode")):
                scheduler.set_timesteps(6)
                if change == "replace":
                    scheduler.sigmas = scheduler.sigmas**2
                else:
                    scheduler.sigmas[1:-1] *= 0.5
                finals.append(denoise(scheduler, normal(2, 8)))
        torch.testing.assert_close(finals[1], finals[0], rtol=2e-6, atol=2e-6)
    noisy = ready(sampler="cps")
    noisy.sigmas = noisy.sigmas**2
    with noisy.record() as trajectory:
        denoise(noisy, normal(2, 8))
    assert torch.equal(trajectory.coefficients, sde.coefficients(noisy.sigmas, "cps"))
    noisy = ready()
    noisy.sigmas[2] = noisy.sigmas[1] + 0.01
    with pytest.raises(ValueError, match="fall strictly"):
        noisy.step(normal(2, 8), noisy.timesteps[0], normal(2, 8))


def test_copies_of_copies_draw_noise_of_their_own() -> None:
    """In every call of a pipeline the same, and never a sibling's, cousin's or parent's."""
    calls = []
    root = FlowMatchSDEScheduler(sampler="cps")
    for _ in range(2):
        root.set_timesteps(4)
        first, second = copy.deepcopy(root), copy.deepcopy(root)
        family = [root, first, second, copy.deepcopy(first), copy.deepcopy(first)]
        family += [copy.deepcopy(second), copy.deepcopy(root), copy.deepcopy(family[3])]
        calls.append(torch.cat([denoise(scheduler, normal(1, 8)) for scheduler in family]))
    assert torch.equal(calls[0], calls[1])
    assert len(calls[0].unique(dim=0)) == 8
    other = FlowMatchSDEScheduler(sampler="cps", seed=1)
    other.set_timesteps(4)
    assert not torch.equal(denoise(copy.deepcopy(other), normal(1, 8)), calls[0][1:2])


def test_a_copy_shares_nothing_that_can_be_overwritten() -> None:
    scheduler = ready()
    expected = [scheduler.sigmas.clone(), scheduler.timesteps.clone()]
    twin = copy.deepcopy(scheduler)
    twin.sigmas.zero_()
    twin.timesteps.zero_()
    assert all(map(torch.equal, [scheduler.sigmas, scheduler.timesteps], expected))


def test_what_copies_do_while_recording_is_kept_and_said() -> None:
    """LTX-2 denoises sound with a copy; its density is none of the video's."""
    scheduler = FlowMatchSDEScheduler(sampler="cps", shift=3.0)
    with warnings.catch_warnings(record=True) as told, scheduler.record() as trajectory:
        warnings.simplefilter("always")
        sound, idle = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
        for each in (scheduler, sound, idle):
            each.set_timesteps(4)
        video, wave = denoise(scheduler, normal(1, 8)), denoise(sound, normal(1, 5))
    (warning,) = told
    assert "1 copies of the scheduler took steps" in str(warning.message)
    assert trajectory.latents.shape == (1, 5, 8)
    assert trajectory.copies[0].latents.shape == (1, 5, 5)
    assert torch.equal(trajectory.latents[:, -1], video)
    assert torch.equal(trajectory.copies[0].latents[:, -1], wave)
    # Nothing more is collected, and a copy may be recorded by itself.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound.set_timesteps(3)
        denoise(sound, normal(1, 5))
        with sound.record() as alone:
            sound.set_timesteps(3)
            denoise(sound, normal(1, 5))
    assert trajectory.copies[0].log_probs.shape == (1, 4)
    assert alone.log_probs.shape == (1, 3)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True, None])
def test_a_seed_that_the_noise_has_not_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed: got .*, expected an integer in \[0, 2\*\*63\)"):
        FlowMatchSDEScheduler(seed=seed)
    with pytest.raises(ValueError, match="seed: got"):
        FlowMatchSDEScheduler().set_seed(seed)
    FlowMatchSDEScheduler(seed=2**63 - 1)


NO_FLOWS = ("DDIM", "EulerDiscrete", "IPNDM", "CMStochasticIterative", "KarrasVe", "UniPCMultistep")


@pytest.mark.parametrize("name", NO_FLOWS)
def test_a_scheduler_in_memory_is_no_flow_unless_it_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="expected a FlowMatch"):
        FlowMatchSDEScheduler.from_config(getattr(stock, f"{name}Scheduler")().config)


def test_compatible_schedulers_sample_the_same_flow() -> None:
    ours = FlowMatchSDEScheduler(shift=3.0)
    assert {made.__name__ for made in ours.compatibles} == {
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
    }
    for made in ours.compatibles:
        there = made.from_config(ours.config)
        assert there.config["shift"] == 3.0
        assert FlowMatchSDEScheduler.from_config(there.config).config["shift"] == 3.0


def test_another_spacing_than_the_multistep_solvers_is_said() -> None:
    wan = stock.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    with pytest.warns(UserWarning, match=r"flow_shift is kept, its spacing of times is not"):
        ours = FlowMatchSDEScheduler.from_config(wan.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = FlowMatchSDEScheduler.from_config(ours.config)
    assert again.config["shift"] == 5.0


def test_input_is_passed_on_as_it_is() -> None:
    x = normal(2, 8)
    assert ready().scale_model_input(x, 3.0) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_default_dtypes_change_nothing(dtype: torch.dtype) -> None:
    expected = denoise(ready(sampler="cps"), normal(2, 8))
    try:
        torch.set_default_dtype(dtype)
        scheduler = ready(sampler="cps")
        scheduler.set_sample_ids([0, 1])
        actual = denoise(scheduler, normal(2, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)
