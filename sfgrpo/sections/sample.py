"""Trajectories and the credit of their steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sfgrpo import names
from sfgrpo.recipe_text import as_euler
from sfgrpo.sections.base import Count, Index, Section


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
    """ "flow", "dance", "ddim", "cps", "precise" or "renoise"; or "module:function", a sampler of
    your own."""
    sampler_options: dict[str, Any] = Field(default={})
    """What the sampler takes beside the step."""
    num_steps: int = Field(default=10, ge=1, le=10_000)
    """T, sampling steps of a training trajectory."""
    eta: float = Field(default=0.7, ge=0, le=100)
    """Stochasticity of the sampler."""
    min_noise: float = Field(default=0.0, ge=0, lt=1)
    """A step whose noise has a smaller standard deviation draws none: it becomes the ODE's, is not
    trained and needs no reward. DDIM-SDE's last noisy step has 0.005, too little to change an
    image, and its log-density is the most sensitive to rounding (`sfgrpo.drift`); yet without it
    the embedded model's end was lower with three seeds of three, so the default keeps it."""
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
    options: dict[str, Any] = Field(default={})
    """What the rule takes beside this section."""
    mixture: str = "sum"
    """How several rewards become one advantage: "sum" (the weighted sum is credited), "gdpo" (each
    reward is credited and normalised before they are summed), "dr_grpo" (no division by the
    standard deviation) or "ranks"; or "module:function": see `sfgrpo.credit.mixtures`."""
    mixture_options: dict[str, Any] = Field(default={})
    """What the mixture takes beside this section."""
    normalize: Literal["joint", "per_step", "centered"] = "joint"
    """Over what mean and std of the gains are taken: see `sfgrpo.ops.gain_advantages`."""
    solver: str = "by_level"
    """How states are carried on to their clean estimates: "by_level", "euler" (the paper's),
    "tweedie", "midpoint", "third_order" or "exact": see `sfgrpo.solvers`; or "module:function"."""
    solver_options: dict[str, Any] = Field(default={})
    """What the solver takes beside the noise level, such as Euler's `substeps`."""
    stride: Count = 1
    """Gains over blocks of this many noisy steps, credited to each step of the block."""
    statistics: Literal["trainable", "all"] = "trainable"
    """Whether noise-free steps, which have no gradient, enter mean and std. They shift the joint
    mean by what says nothing about the steps that can learn, and cost estimates of their own.
    Measured in a window of 4, "all" is ahead by iterations (benchmarks/results/claims.md)."""
    clamp: float | None = Field(default=5.0, gt=0)
    """Limit of |advantage|."""

    @field_validator("rule", "mixture", "solver")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        kinds = {"rule": names.RULE, "mixture": names.MIXTURE, "solver": names.SOLVER}
        kinds[str(info.field_name)].check(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _before_solvers(cls, given: Any) -> Any:
        return as_euler(given)
