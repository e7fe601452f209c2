"""Any diffusers flow pipeline samples with any SDE of `sfgrpo.sde`.

    pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config, kind="ddim", eta=0.7)
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
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

# Pipelines that were saved with this scheduler look for its base class by name in this module.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfgrpo import ops, sde
from sfgrpo.names import unknown_name


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """What a step returns; the first field is all that pipelines read."""

    prev_sample: Tensor  # [B, ...]
    log_prob: Tensor  # fp32 [B]: density of prev_sample, mean per element in nats; 0 without noise
    pred_original_sample: Tensor  # [B, ...]: the clean estimate x - t v


class Trajectory:
    """The steps that `FlowMatchSDEScheduler.record` collects: B images, T steps.

    Step k led from `latents[:, k]` to `next_latents[:, k]` with `coefficients[k]`: all that
    `ops.sde_logprob` needs to score it again. Properties stack at each access, on the device of
    the latents, and raise RuntimeError before the first step.
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []

    @property
    def latents(self) -> Tensor:
        """`[B, T + 1, ...]`: what each step started from, then the final latents."""
        return torch.cat([self._stack("start", 1), self._steps[-1]["end"].unsqueeze(1)], 1)

    @property
    def next_latents(self) -> Tensor:
        """`[B, T, ...]`: what each step returned: `latents[:, 1:]` if the pipeline kept it so."""
        return self._stack("end", 1)

    @property
    def log_probs(self) -> Tensor:
        """fp32 `[B, T]`: log-densities of the steps, mean per element; 0 on noise-free steps."""
        return self._stack("log_prob", 1)

    @property
    def clean(self) -> Tensor:
        """`[B, T, ...]`: the clean estimate at the start of each step."""
        return self._stack("clean", 1)

    @property
    def sigmas(self) -> Tensor:
        """`[T + 1]`: the scheduler's noise levels."""
        return torch.cat([self._stack("sigmas")[:, 0], self._steps[-1]["sigmas"][1:]])

    @property
    def coefficients(self) -> Tensor:
        """`[T, 4]`: (a, b, n, t) of each step, see `sfgrpo.sde`."""
        return self._stack("coefficients")

    def _stack(self, field: str, dim: int = 0) -> Tensor:
        if not self._steps:
            raise RuntimeError("trajectory: empty; run the pipeline inside scheduler.record()")
        return torch.stack([step[field] for step in self._steps], dim)

    def _add(self, start: Tensor, end: Tensor, **step: Any) -> None:
        if self._steps and step["index"] != self._steps[-1]["index"] + 1:
            raise RuntimeError("record: got a second run, expected one; open a record() for each")
        # Copies, since the pipeline may edit its latents in place.
        self._steps.append({"start": start.detach().clone(), "end": end.clone(), **step})


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """A FlowMatchEulerDiscreteScheduler whose step may be stochastic, and knows its density.

    Noise is a function of (`seed`, sample id, step, element): an image is the same alone and in
    any batch, on any device. Sample ids are 0 .. B-1 unless `set_sample_ids` says otherwise, so
    two calls of a pipeline share their noise (not their starting latents, which are the
    pipeline's own) until `set_seed` or `set_sample_ids`. A pipeline that hands its `generator` to
    the step (Sana) has the noise drawn from that instead.
    """

    _compatibles: ClassVar[list[str]] = [
        "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler",
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
        stochastic_sampling: bool = False, kind: str = "ddim", eta: float = 0.7, seed: int = 0,
    ) -> None:  # fmt: skip
        """FlowMatchEulerDiscreteScheduler's arguments (`stochastic_sampling` is "renoise") and:

        Args:
            kind: a name in `sfgrpo.sde.SAMPLERS`; ValueError if unknown.
            eta: stochasticity; 0 is the ODE. `set_timesteps` finds out if it is too large.
            seed: key of the noise, in [0, 2**63).
        """
        if kind not in sde.SAMPLERS:
            raise ValueError(unknown_name("sampler", kind, sde.SAMPLERS))
        if stochastic_sampling and kind != "renoise":
            raise ValueError(
                f"kind: got '{kind}' with stochastic_sampling=True, which is kind='renoise'; "
                f"pass stochastic_sampling=False to sample with '{kind}'"
            )
        # register_to_config has stored every argument before this body runs.
        base = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        super().__init__(**{name: self.config[name] for name in base if name in self.config})
        self._table: Tensor | None = None
        self._sample_ids: Tensor | None = None
        self._trajectory: Trajectory | None = None
        self._stream = self._copies = 0

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the configuration of any flow scheduler, and arguments that override it.

        Besides FlowMatch* these are multistep ones in flow mode (Wan's UniPCMultistepScheduler):
        their `flow_shift` becomes `shift`, but the spacing is FlowMatchEulerDiscreteScheduler's.
        Without a `kind`, `stochastic_sampling=True` means "renoise". ValueError if not a flow.
        """
        if isinstance(config, dict):
            _require_flow(config)
            given = {**config, **kwargs}
            if "flow_shift" in given and "shift" not in given:
                kwargs["shift"] = given["flow_shift"]
            if given.get("stochastic_sampling") and "kind" not in given:
                kwargs["kind"] = "renoise"
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_seed(self, seed: int) -> None:
        """Another key for the noise, in [0, 2**63); it becomes part of the configuration."""
        defaults = set(self.config.get("_use_default_values", ())) - {"seed"}
        self.register_to_config(seed=seed, _use_default_values=list(defaults))

    def set_sample_ids(self, sample_ids: Tensor | Sequence[int] | None) -> None:
        """Identity of each image's noise, int64 `[B]`, until set again; None means 0 .. B-1."""
        ids = None if sample_ids is None else torch.as_tensor(sample_ids)
        if ids is not None and (ids.dtype != torch.int64 or ids.ndim != 1):
            raise ValueError(f"sample_ids: got {ids.dtype} {tuple(ids.shape)}, expected int64 [B]")
        self._sample_ids = ids

    @contextlib.contextmanager
    def record(self) -> Iterator[Trajectory]:
        """Collect the steps of one run; outside such a block nothing is kept."""
        if self._trajectory is not None:
            raise RuntimeError("record: this scheduler is recording already")
        self._trajectory = Trajectory()
        try:
            yield self._trajectory
        finally:
            self._trajectory = None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
        sigmas: list[float] | None = None, mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:  # fmt: skip
        """The base class's; ValueError for what `sde.coefficients` refuses, as too large an eta."""
        options: dict[str, Any] = {"device": device, "sigmas": sigmas, "mu": mu}
        super().set_timesteps(num_inference_steps, timesteps=timesteps, **options)
        levels = self.sigmas.cpu().double()  # the only wait for the device
        if self.config["invert_sigmas"]:
            levels = 1 - levels
        table = _table(levels, self.config["kind"], self.config["eta"])
        self._noisy = [n > 0 for n in table[:, 2].tolist()]
        self._table = table.to(self.sigmas.device)
        self._copies = 0

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
            coef.to(wide).expand(len(x), 4), seed=self.config["seed"],
            sample_ids=self._ids(x), step_ids=(self._stream << 16) + k, noise=noise,
        )  # fmt: skip
        self._step_index = k + 1
        if self._trajectory is not None:
            self._trajectory._add(
                x, prev_sample, index=k, log_prob=log_prob, clean=clean, coefficients=coef,
                sigmas=self.sigmas[k : k + 2],
            )  # fmt: skip
        output = FlowMatchSDESchedulerOutput(prev_sample, log_prob, clean)
        return output if return_dict else output.to_tuple()

    def _locate(self, timestep: Any, device: torch.device) -> tuple[int, Tensor]:
        """The index of the step to take and its row of the coefficient table, on `device`."""
        if self._table is None:
            raise ValueError("step: call set_timesteps first")
        if not torch.as_tensor(timestep).is_floating_point():
            raise ValueError("timestep: got an integer, expected an element of scheduler.timesteps")
        if self._step_index is None:
            self._init_step_index(timestep)
        k = self._step_index
        if k is None or k >= len(self._table):
            raise ValueError(f"step: all {k} steps are done; call set_timesteps")
        self._table = self._table.to(device)
        return k, self._table[k]

    def _ids(self, x: Tensor) -> Tensor:
        if self._sample_ids is None:
            return torch.arange(len(x), device=x.device)
        self._sample_ids = self._sample_ids.to(x.device)
        return self._sample_ids

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowMatchSDEScheduler:
        """A copy with other noise: pipelines copy one per modality (LTX-2) or frame (SkyReels)."""
        self._copies += 1
        twin = copy.copy(self)
        twin._stream, twin._trajectory = self._stream + self._copies, None
        return twin


def _require_flow(config: dict[str, Any]) -> None:
    """Refuse the configuration of a scheduler that does not sample a rectified flow."""
    name, prediction = config.get("_class_name", "scheduler"), config.get("prediction_type")
    flow = prediction == "flow_prediction" and config.get("use_flow_sigmas")
    plain = prediction is None and not hasattr(diffusers, name)
    if not (flow or plain or name.startswith("FlowMatch")) or config.get("scale_factors"):
        raise ValueError(
            f"config: got a {name}'s (prediction_type={prediction!r}), expected a FlowMatch*'s "
            "without scale_factors, or prediction_type='flow_prediction' and use_flow_sigmas=True"
        )


def _table(levels: Tensor, kind: str, eta: float) -> Tensor:
    """`sde.coefficients`, but a repeated level stands still: custom sigmas may end in 0, 0."""
    moves = levels[1:] != levels[:-1]
    table = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(moves), 1)
    table[:, 3] = levels[:-1]
    table[moves] = sde.coefficients(torch.cat([levels[:1], levels[1:][moves]]), kind, eta)
    return table
