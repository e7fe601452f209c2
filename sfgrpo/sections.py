"""The sections of a recipe: every key, what it may be, and what it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sfgrpo import names
from sfgrpo.recipe_text import as_euler, refuse_mistaken


class Section(BaseModel):
    """A frozen group of keys; unknown ones are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_mistaken(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def _home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


Source = Annotated[str, BeforeValidator(_home)]
"""Text that may be a path: ~ is the home folder."""
Folder = Annotated[Path, BeforeValidator(_home)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Run(Section):
    output_dir: Folder = Path("runs/default")
    """Where metrics, checkpoints, grids and the report go."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of all randomness; (seed, sample, step, element) decides every number drawn."""
    iterations: Count = 100
    """Iterations of: sample, score, credit, update."""
    peer_timeout: float = Field(default=30, ge=1, le=86_400)
    """Seconds after which a machine that fell silent is given up and the run ends. A rank that
    dies, or whose machine says so, ends the run at once."""


class Model(Section):
    backbone: str = "sd3"
    """A file in sfgrpo/backbones: which family of pipelines `path` holds; or "module:function",
    a backbone of your own."""
    options: dict[str, Any] = {}
    """Arguments of the backbone's `load` that no other key sets."""
    path: Source = "embedded"
    """Local folder or hub id of a diffusers pipeline; "embedded" is the model in this package."""
    resolution: int | tuple[int, int] = 32
    """Pixels: the side of square images, or [height, width]."""
    num_frames: Count = 1
    """Frames of a video; 1 for images."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network in sampling and training; latents and densities stay fp32."""
    max_sequence_length: int | None = Field(default=None, ge=0, lt=2**31)
    """Tokens of the prompt embedding (of T5, where CLIP reads it, too); null is the stock
    pipeline's number, 0 is for Stable Diffusion 3 without T5."""
    text_encoders: Literal["resident", "offload"] = "resident"
    """Where the text encoders are while they do not embed: on the device, or in main memory."""
    prompt_cache: Folder | None = None
    """Folder of prompt embeddings, keyed by their content. All prompts of a run are embedded before
    the network is loaded, then the text encoders leave memory; where all is there already they are
    not loaded."""
    attention: str = "auto"
    """diffusers' attention backend: "native", "xformers", "flash", "_flash_3", ...; "auto" takes
    what is installed and serves the network. One that cannot serve is an error."""
    compile_blocks: bool = False
    """torch.compile the network's repeated blocks; not at ZeRO stage 3."""
    decode_batch: Count | None = None
    """Samples decoded and scored at once; null is 64 images or one video."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory at large sizes, faint seams."""
    vae_slicing: bool = False
    """Decode one sample after the other."""

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        names.BACKBONE.check(name)
        return name

    @field_validator("resolution")
    @classmethod
    def _positive(cls, sides: int | tuple[int, int]) -> int | tuple[int, int]:
        if min((sides,) if isinstance(sides, int) else sides) < 8:
            raise ValueError("sides must be at least 8 pixels")
        return sides

    @model_validator(mode="after")
    def _serves(self) -> Model:
        if self.prompt_cache is not None and ":" in self.backbone:
            raise ValueError("prompt_cache: only backbones of this package have text encoders")
        return self

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, frames)."""
        sides = self.resolution
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return height, width, self.num_frames


class Lora(Section):
    rank: Count = 32
    alpha: Count = 64
    targets: tuple[str, ...] | None = None
    """Ends of the names of the linear layers that get adapters; null is the backbone's own list."""
    path: Folder | None = None
    """Adapters to start from, of the same rank and layers: an exported folder, or a file of
    diffusers or peft; null starts from none. The reference of `train.beta` is the network without
    adapters all the same, as in Flow-GRPO."""


class Window(Section):
    """Noise in a few neighbouring steps of each iteration, the ODE elsewhere."""

    steps: Count = 4
    """w, noisy steps of an iteration; they alone are trained, and their states alone are scored."""
    schedule: Literal["random", "progressive", "frozen"] = "random"
    """Where the window lies: drawn anew for every iteration (Flow-GRPO-Fast), moving from the first
    steps to the last and over again (MixGRPO), or on the first steps for ever."""
    interval: Count = 25
    """Iterations after which a progressive window moves (MixGRPO's tau)."""
    stride: Count = 1
    """Steps by which it moves."""
    range: tuple[Index, Index] | None = None
    """The steps [first, last) of the sampler among which the window lies; null is all that have
    noise."""
    continuation: Literal["solver", "steps"] = "solver"
    """How the image behind the window is made: by `credit.solver` from the window's last state, or
    in the sampler's steps without noise."""

    @model_validator(mode="after")
    def _fits(self) -> Window:
        if self.range is not None and self.range[1] - self.range[0] < self.steps:
            raise ValueError(f"range: {list(self.range)} holds fewer than steps: {self.steps}")
        return self


class Sample(Section):
    sampler: str = "ddim"
    """ "flow", "dance", "ddim", "cps" or "renoise"; or "module:function", a sampler of your own."""
    sampler_options: dict[str, Any] = {}
    """What the sampler takes beside the step."""
    num_steps: int = Field(default=10, ge=1, le=10_000)
    """T, sampling steps of a training trajectory."""
    eta: float = Field(default=0.7, ge=0, le=100)
    """Stochasticity of the sampler."""
    min_noise: float = Field(default=0.0, ge=0, lt=1)
    """A step whose noise has a smaller standard deviation draws none: it becomes the ODE's, is not
    trained and needs no reward. DDIM-SDE's last noisy step has 0.005, too little to change an
    image, and its log-density is the most sensitive to rounding (`sfgrpo.drift`)."""
    window: Window | None = None
    """Noise in a window of the steps; null is noise in all that have it."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Scale w of classifier-free guidance, v_u + w (v_c - v_u); 1 runs the conditional branch
    alone."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    embedded_guidance: float | None = Field(default=None, ge=0)
    """The guidance that a distilled network (FLUX.1-dev, FLUX.2-dev) is told; null for others."""
    prompts_per_iteration: Count = 8
    """P, groups of one iteration."""
    group_size: int = Field(default=12, ge=2, lt=2**31)
    """N, trajectories per prompt: each prompt drawn is repeated so often (Flow-GRPO's k)."""
    batch_size: Count = 96
    """Rows of one forward in sampling."""

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
        names.SAMPLER.check(name)
        if name == "ode":
            raise ValueError("'ode' draws no noise, so there is no policy to train; use 'ddim'")
        return name


class Credit(Section):
    rule: str = "stepwise"
    """ "stepwise" (gains of clean estimates) or "uniform" (Flow-GRPO); or "module:function", a rule
    of your own."""
    options: dict[str, Any] = {}
    """What the rule takes beside this section."""
    normalize: Literal["joint", "per_step", "centered"] = "joint"
    """Over what mean and std of the gains are taken: see `sfgrpo.ops.gain_advantages`."""
    solver: str = "by_level"
    """How states are carried on to their clean estimates: "by_level", "euler" (the paper's),
    "tweedie", "midpoint", "third_order" or "exact": see `sfgrpo.solvers`; or "module:function"."""
    solver_options: dict[str, Any] = {}
    """What the solver takes beside the noise level, such as Euler's `substeps`."""
    stride: Count = 1
    """Gains over blocks of this many noisy steps, credited to each step of the block."""
    statistics: Literal["trainable", "all"] = "trainable"
    """Whether noise-free steps, which have no gradient, enter mean and std. They shift the joint
    mean by what says nothing about the steps that can learn, and cost estimates of their own."""
    clamp: float | None = Field(default=5.0, gt=0)
    """Limit of |advantage|."""

    @field_validator("rule", "solver")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        {"rule": names.RULE, "solver": names.SOLVER}[str(info.field_name)].check(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _before_solvers(cls, given: Any) -> Any:
        return as_euler(given)


class Train(Section):
    learning_rate: float = Field(default=3e-4, gt=0)
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


class Eval(Section):
    every: Count = 10
    """Iterations between evaluations; the first and the last state are always evaluated."""
    num_steps: int = Field(default=10, ge=1, le=10_000)
    """ODE steps."""
    images_per_prompt: int = Field(default=4, ge=2, lt=2**31)
    """Images from fixed noise that training never draws."""
    prompts: Count = 40
    """Held-out noise is shown on this many prompts, spread evenly over those of evaluation."""
    prompts_from: Source | None = None
    """Prompts of evaluation, a source like `prompts`; null: the validation or test split of a
    folder that has one, else those of `held_out`, else the training prompts."""
    held_out: float = Field(default=0, ge=0, lt=1)
    """Share of `prompts` that training never sees and evaluation shows, chosen by a hash of the
    prompt's text, so that it stays when prompts are added."""
    judges: tuple[str, ...] = ()
    """Measures that training never sees, as "module:function"."""
    judge_options: dict[str, dict[str, Any]] = {}
    """What a judge takes beside images and metadata, by the judge's name."""

    @field_validator("judges")
    @classmethod
    def _named(cls, judges: tuple[str, ...]) -> tuple[str, ...]:
        for name in judges:
            names.JUDGE.check(name)
        return judges

    @model_validator(mode="after")
    def _one_source(self) -> Eval:
        if self.prompts_from is not None and self.held_out:
            raise ValueError("prompts_from and held_out exclude each other")
        for name in self.judge_options:
            if name not in self.judges:
                text = names.unknown_name("judge in judge_options", name, self.judges)
                raise ValueError(text)
        return self


class Checkpoint(Section):
    every: Count = 10
    """Iterations between checkpoints; the last state is always saved."""
    keep: Count = 2
    """How many are kept."""
    keep_best: bool = False
    """Whether `checkpoints/best` keeps the weights of the evaluation with the highest reward."""


class Deepspeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is sharded over ranks: 1 optimiser state, 2 also gradients, 3 also parameters. bf16 and
    fp16 run at least stage 1 (see `sfgrpo.engine`)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimiser's state lies and its steps are computed; "cpu" from stage 1 on."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters wait until a layer runs; "cpu" at stage 3."""
    gather_for_sampling: Literal["auto", "rollout", "layer"] = "auto"
    """At stage 3: gather all parameters once for a rollout, or each layer whenever it runs; "auto"
    gathers once if that takes at most half of the free memory."""

    @model_validator(mode="after")
    def _needs_its_stage(self) -> Deepspeed:
        for key, stage in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, key) == "cpu" and self.zero_stage < stage:
                raise ValueError(f"{key}: cpu needs zero_stage {stage} or more")
        return self
