"""What a step of `sfgrpo.scheduler` returns, and what is kept of a pipeline's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """What a step returns; the first field is all that pipelines read."""

    prev_sample: Tensor  # [B, ...]
    log_prob: Tensor  # fp32 [B]: density of prev_sample, mean per element in nats; 0 without noise
    pred_original_sample: Tensor  # [B, ...]: the clean estimate x - t v


class Trajectory:
    """The steps that one scheduler took under `FlowMatchSDEScheduler.record`: B images, T steps.

    Step k led from `latents[:, k]` to `next_latents[:, k]` with `coefficients[k]`: all that
    `ops.sde_logprob` needs to score it again. Properties stack at each access, on the device of
    the latents, and raise RuntimeError before the first step.
    """

    def __init__(self) -> None:
        self.copies: list[Trajectory] = []
        """What copies of the scheduler did that the pipeline made meanwhile, in their order: LTX-2
        denoises sound with one. No part of `log_probs`, since their elements are others."""
        self.open = True
        """Whether steps are still collected."""
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

    def add(self, start: Tensor, end: Tensor, **step: Any) -> None:
        """Keep a step; RuntimeError if it does not follow the one before."""
        if self._steps and step["index"] != self._steps[-1]["index"] + 1:
            raise RuntimeError("record: got a second run, expected one; open a record() for each")
        # Copies, since the pipeline may edit its latents in place.
        self._steps.append({"start": start.detach().clone(), "end": end.clone(), **step})

    def copy(self) -> Trajectory:
        """An empty one for a copy of the scheduler."""
        self.copies.append(Trajectory())
        return self.copies[-1]

    def close(self) -> int:
        """Collect no more, here and in copies; returns how many copies took steps."""
        self.open = False
        return sum(bool(part._steps) + part.close() for part in self.copies)

    def _stack(self, field: str, dim: int = 0) -> Tensor:
        if not self._steps:
            raise RuntimeError("trajectory: empty; run the pipeline inside scheduler.record()")
        return torch.stack([step[field] for step in self._steps], dim)
