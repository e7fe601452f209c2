"""Any diffusers flow pipeline samples with any SDE of `sfgrpo.sde`.

    ours = FlowMatchSDEScheduler.from_config(pipe.scheduler.config, sampler="ddim", eta=0.7)
    pipe.scheduler = ours
    with pipe.scheduler.record() as trajectory:
        images = pipe(prompt).images
    trajectory.log_probs  # [B, T]: B images, T steps

The schedule (shifting, custom sigmas, Karras spacing, begin index) is that of diffusers'
FlowMatchEulerDiscreteScheduler; a step is `sfgrpo.ops.sde_step_x0` with one row of
`sfgrpo.sde.coefficients`. Left out: timesteps per token (LTX conditions), upscaling between steps,
and gradients through a step (`ops.sde_logprob` has them).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

# Pipelines that were saved with this scheduler look for its base class by name in this module.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfgrpo import ops, sde
from sfgrpo.names import unknown_name
from sfgrpo.recording import FlowMatchSDESchedulerOutput, Trajectory


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """A FlowMatchEulerDiscreteScheduler whose step may be stochastic, and knows its density.

    Noise is a function of (`seed`, sample id, step, element): an image is the same alone and in
    any batch, on any device. Sample ids are 0 .. B-1 unless `set_sample_ids` says otherwise, so
    two calls of a pipeline share their noise (not their starting latents, which are the
    pipeline's own) until `set_seed` or `set_sample_ids`. A pipeline that hands its `generator` to
    the step (Sana) has the noise drawn from that instead.
    """

    # Not UniPC and DPMSolver: without more than our configuration they predict epsilon.
    _compatibles: ClassVar[list[str]] = [
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
    ]  # fmt: skip
    sigmas: Tensor
    timesteps: Tensor

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0,
        use_dynamic_shifting: bool = False, base_shift: float | None = 0.5,
        max_shift: float | None = 1.15, base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096, invert_sigmas: bool = False,
        shift_terminal: float | None = None, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False, sampler: str = "ddim", eta: float = 0.7, seed: int = 0,
    ) -> None:  # fmt: skip
        """FlowMatchEulerDiscreteScheduler's arguments (`stochastic_sampling` is "renoise") and:

        Args:
            sampler: a name in `sfgrpo.sde.SAMPLERS`; ValueError if unknown.
            eta: stochasticity; 0 is the ODE. `set_timesteps` finds out if it is too large.
            seed: key of the noise, in [0, 2**63); ValueError for others.
        """
        _check_seed(seed)
        if sampler not in sde.SAMPLERS:
            raise ValueError(unknown_name("sampler", sampler, sde.SAMPLERS))
        if stochastic_sampling and sampler != "renoise":
            raise ValueError(
                f"sampler: got '{sampler}' with stochastic_sampling=True, which is 'renoise'; "
                f"pass stochastic_sampling=False to sample with '{sampler}'"
            )
        # register_to_config has stored every argument before this body runs.
        base = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        super().__init__(**{name: self.config[name] for name in base if name in self.config})
        self._table: Tensor | None = None
        self._tabled: tuple[Tensor, int] | None = None
        self._sample_ids: Tensor | None = None
        self._trajectory: Trajectory | None = None
        self._copies, self._line = 0, tuple[int, ...]()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the configuration of any flow scheduler, and arguments that override it.

        Besides FlowMatch* these are multistep ones in flow mode (Wan's UniPCMultistepScheduler):
        their `flow_shift` becomes `shift`, but the spacing is FlowMatchEulerDiscreteScheduler's,
        which a warning says. Without a `sampler`, `stochastic_sampling=True` means "renoise".
        ValueError if not a flow.
        """
        if isinstance(config, dict):
            if _require_flow(config) and "sampler" not in config:
                name = config.get("_class_name", "a multistep scheduler")
                warnings.warn(
                    f"{name}: flow_shift is kept, its spacing of times is not", stacklevel=2
                )
            given = {**config, **kwargs}
            if "flow_shift" in given and "shift" not in given:
                kwargs["shift"] = given["flow_shift"]
            if given.get("stochastic_sampling") and "sampler" not in given:
                kwargs["sampler"] = "renoise"
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_seed(self, seed: int) -> None:
        """Another key for the noise; it becomes part of the configuration. ValueError as above."""
        _check_seed(seed)
        defaults = set(self.config.get("_use_default_values", ())) - {"seed"}
        self.register_to_config(seed=seed, _use_default_values=list(defaults))

    def set_sample_ids(self, sample_ids: Tensor | Sequence[int] | None) -> None:
        """Identity of each image's noise, int64 `[B]`, until set again; None means 0 .. B-1."""
        ids = sample_ids
        if ids is not None and not isinstance(ids, Tensor):
            ids = torch.as_tensor(ids, device="cpu")
        if ids is not None and (ids.dtype != torch.int64 or ids.ndim != 1):
            raise ValueError(f"sample_ids: got {ids.dtype} {tuple(ids.shape)}, expected int64 [B]")
        self._sample_ids = ids

    @contextlib.contextmanager
    def record(self) -> Iterator[Trajectory]:
        """Collect the steps of one run; outside such a block nothing is kept.

        What copies do that the pipeline makes meanwhile is in `Trajectory.copies`; a warning at the
        end says if there is such."""
        if self._recording():
            raise RuntimeError("record: this scheduler is recording already")
        self._trajectory = trajectory = Trajectory()
        try:
            yield trajectory
        finally:
            self._trajectory, copies = None, trajectory.close()
            if copies:
                warnings.warn(
                    f"record: {copies} copies of the scheduler took steps, too (sound, frames): "
                    "log_probs are without them, see trajectory.copies",
                    stacklevel=3,
                )

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
        sigmas: list[float] | None = None, mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:  # fmt: skip
        """The base class's; ValueError for what `sde.coefficients` refuses, as too large an eta."""
        options: dict[str, Any] = {"device": device, "sigmas": sigmas, "mu": mu}
        super().set_timesteps(num_inference_steps, timesteps=timesteps, **options)
        with torch.inference_mode(False):  # or it would not count what is written into it
            self.sigmas = self.sigmas.clone().float()
        self._tabulate()
        self._copies = 0

    def _tabulate(self) -> Tensor:
        """The coefficients of `sigmas`, which waits for the device if they are not known yet: they
        may be replaced or overwritten after `set_timesteps`, as the base class allows."""
        version = 0 if self.sigmas.is_inference() else self.sigmas._version
        seen, told = self._tabled or (None, -1)
        if self._table is None or seen is not self.sigmas or told != version:
            levels = self.sigmas.cpu().double()
            levels = 1 - levels if self.config["invert_sigmas"] else levels
            table = _table(levels, self.config["sampler"], self.config["eta"])
            self._noisy = [n > 0 for n in table[:, 2].tolist()]
            self._table, self._tabled = table.to(self.sigmas.device), (self.sigmas, version)
        return self._table

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: Bria's pipeline asks every scheduler but the base class itself."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor,
        s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = float("inf"),
        s_noise: float = 1.0, generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None, return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """One step of the SDE, computed in fp32; not differentiable.

        The result has the wider dtype of `model_output` and `sample`: FlowMatchEulerDiscrete's
        rounds fp32 latents (Wan, Hunyuan) to a bf16 network's dtype, and the noise of a late step
        may be smaller than that rounding. `log_prob` is that of the rounded result.

        Args:
            model_output, sample: velocity (guidance applied) and latents, `[B, ...]`.
            timestep: an element of `timesteps`; `s_*` are unused, as in the base class.
            generator: one, or one per image, to draw the noise from instead of `seed`.
            return_dict: False returns the output's fields as a tuple.

        Raises:
            ValueError: `set_timesteps` is due, or the timestep is an integer or one per token.
        """
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps: got a tensor, expected None; not supported")
        k, coef = self._locate(timestep, sample.device)
        x = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        wide = torch.promote_types(x.dtype, torch.float32)
        noise = None
        if generator is not None and self._noisy[k]:
            noise = randn_tensor(x.shape, generator, device=x.device, dtype=wide)
        prev_sample, log_prob, clean = ops.sde_step_x0(
            x, -model_output if self.config["invert_sigmas"] else model_output,
            coef.to(wide).expand(len(x), 4), seed=self._key(),
            sample_ids=self._ids(x), step_ids=k, noise=noise,
        )  # fmt: skip
        self._step_index = k + 1
        if recording := self._recording():
            recording.add(
                x, prev_sample, index=k, log_prob=log_prob, clean=clean, coefficients=coef,
                sigmas=self.sigmas[k : k + 2],
            )  # fmt: skip
        output = FlowMatchSDESchedulerOutput(prev_sample, log_prob, clean)
        return output if return_dict else output.to_tuple()

    def _locate(self, timestep: Any, device: torch.device) -> tuple[int, Tensor]:
        """The index of the step to take and its row of the coefficient table, on `device`."""
        if self._table is None:
            raise ValueError("step: call set_timesteps first")
        number: Any = timestep
        number = number if torch.is_tensor(number) else torch.tensor(number, device="cpu")
        if not number.is_floating_point():
            raise ValueError("timestep: got an integer, expected an element of scheduler.timesteps")
        if self._step_index is None:
            self._init_step_index(timestep)
        k = self._step_index
        table = self._tabulate()
        if k is None or k >= len(table):
            raise ValueError(f"step: all {k} steps are done; call set_timesteps")
        self._table = table.to(device)
        return k, self._table[k]

    def _key(self) -> int:
        """The seed; of a copy, one that depends on the seed and on its line of descent."""
        seed = self.config["seed"]
        digest = hashlib.sha256(f"{seed} {self._line}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 2**63 if self._line else seed

    def _recording(self) -> Trajectory | None:
        """What collects the steps, if anything does."""
        return self._trajectory if self._trajectory and self._trajectory.open else None

    def _ids(self, x: Tensor) -> Tensor:
        if self._sample_ids is None:
            return torch.arange(len(x), device=x.device)
        self._sample_ids = self._sample_ids.to(x.device)
        return self._sample_ids

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowMatchSDEScheduler:
        """A copy with other noise: pipelines copy one per modality (LTX-2) or frame (SkyReels)."""
        self._copies += 1
        twin = copy.copy(self)
        twin._line, twin._copies = (*self._line, self._copies), 0
        recording = self._recording()
        twin._trajectory = recording.copy() if recording else None
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(twin, name, value.clone())
        return twin


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}, expected an integer in [0, 2**63)")


def _require_flow(config: dict[str, Any]) -> bool:
    """Refuse the configuration of a scheduler that does not sample a rectified flow; returns
    whether it is a multistep one's."""
    name, prediction = config.get("_class_name", ""), config.get("prediction_type")
    multistep = prediction == "flow_prediction" and bool(config.get("use_flow_sigmas"))
    # A configuration that was never saved has no name; that of a flow has a shift.
    plain = prediction is None and "shift" in config and not (name and hasattr(diffusers, name))
    if not (multistep or plain or name.startswith("FlowMatch")) or config.get("scale_factors"):
        raise ValueError(
            f"config: got a {name or 'scheduler'}'s (prediction_type={prediction!r}), expected a "
            "FlowMatch*'s without scale_factors, or prediction_type='flow_prediction' and "
            "use_flow_sigmas=True"
        )
    return multistep


def _table(levels: Tensor, sampler: str, eta: float) -> Tensor:
    """`sde.coefficients`, but a repeated level stands still: custom sigmas may end in 0, 0."""
    moves = levels[1:] != levels[:-1]
    table = levels.new_zeros(len(moves), 4, dtype=torch.float32)
    table[:, 0], table[:, 3] = 1, levels[:-1]
    table[moves] = sde.coefficients(torch.cat([levels[:1], levels[1:][moves]]), sampler, eta)
    return table
