"""How the policy is updated, and over how many ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from sfgrpo.sections.base import Count, Decay, Section


class RateDecay(Section):
    shape: Literal["cosine", "linear"] = "cosine"
    """Along half a cosine, or a line."""
    iterations: Count
    """How many it takes, warm-up included. Not run.iterations, so that a run that is made longer
    stays the same run."""
    end: float = Field(default=0.0, ge=0, le=1)
    """Share of learning_rate that is left then and kept."""


class Train(Section):
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: int = Field(default=0, ge=0, lt=2**31)
    """Iterations in which the learning rate rises linearly to its value."""
    rate_decay: RateDecay | None = None
    """How it falls after that; null is not at all."""
    weight_decay: float = Field(default=1e-4, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay of the first and the second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    clip_range: float = Field(default=1e-4, gt=0, lt=1)
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]; small, since the log-density is a
    mean over elements."""
    beta: float = Field(default=0.04, ge=0)
    """Weight of the KL to the frozen start."""
    kl: Literal["gaussian", "flow_grpo", "velocity"] = "gaussian"
    """Which KL `beta` weighs: see `sfgrpo.sde.kl_scale`."""
    step_weights: Literal["equal", "balanced"] = "balanced"
    """Weight of each step in the policy term: see `sfgrpo.sde.step_weights`."""
    ratio: Literal["density", "guard"] = "density"
    """What is clipped: the ratio of the densities, or GRPO-Guard's, whose logarithm is scaled by
    the step's noise: see `sfgrpo.ops.policy_loss`."""
    old_logp: Literal["training", "sampling"] = "training"
    """Where the ratio's old log-density comes from: from the training forward, before the first
    update (rows of later updates get one forward without gradient), so that rounding never moves a
    ratio; or from the sampler, as published code has it, which is right only where rollout and
    training give the same velocities to the last digits (`sfgrpo.drift`)."""
    updates_per_iteration: Count = 1
    """Optimiser steps an iteration's rows are split over, each row used once."""
    micro_batch_size: Count = 96
    """Rows of one forward and backward; gradients accumulate over micro-batches."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, the same
    gradients."""
    offload_activations: Literal["none", "cpu"] = "none"
    """Where the inputs of blocks wait for the backward pass, with gradient_checkpointing: "cpu" for
    long sequences, whose inputs alone fill a GPU. The same gradients, for the time of two
    copies."""
    loss_scale: Literal["dynamic"] | PositiveFloat = "dynamic"
    """fp16: what the loss is multiplied with so that small gradients survive; "dynamic" halves it
    on overflow (that optimiser step is skipped) and doubles it after 1000 good steps."""
    on_nonfinite: Literal["stop", "drop_group"] = "stop"
    """When a reward is not finite: stop with its name and prompt, or give the whole group advantage
    0, leave it out of the statistics and count it (`dropped_groups`). A loss or gradient that is
    not finite always stops the run."""
    drift_budget: float | None = Field(default=None, gt=0)
    """Largest relative difference of the velocities in rollout and training that passes for
    rounding; null is that of model.dtype. Each step's budget of |logp in training - logp at
    sampling| follows from it, and a run beyond it stops: see `sfgrpo.drift`."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay per optimiser step of the averaged weights that are evaluated; 0 switches it off."""

    @model_validator(mode="after")
    def _inputs_alone(self) -> Train:
        if self.offload_activations == "cpu" and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations: cpu needs gradient_checkpointing; without it every layer "
                "keeps several tensors, and copying all of them takes longer than computing them"
            )
        return self

    @model_validator(mode="after")
    def _warm_before_it_falls(self) -> Train:
        if self.rate_decay and self.rate_decay.iterations <= self.warmup:
            raise ValueError(
                f"rate_decay.iterations: must be more than the {self.warmup} of warmup, got "
                f"{self.rate_decay.iterations}"
            )
        return self


class Deepspeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is sharded over ranks: 1 optimiser state, 2 also gradients, 3 also parameters. bf16 and
    fp16 run at least stage 1 (see `sfgrpo.engine`). A run may go on at another of 1 to 3."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimiser's state lies and its steps are computed; "cpu" from stage 1 on."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters wait until a layer runs; "cpu" at stage 3."""
    gather_for_sampling: Literal["auto", "rollout", "layer"] = "auto"
    """At stage 3: gather all parameters once for a rollout, or each layer whenever it runs; "auto"
    gathers once if that takes at most half of what is free beside one whole copy."""

    @model_validator(mode="after")
    def _needs_its_stage(self) -> Deepspeed:
        for key, stage in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, key) == "cpu" and self.zero_stage < stage:
                raise ValueError(f"{key}: cpu needs zero_stage {stage} or more")
        return self
