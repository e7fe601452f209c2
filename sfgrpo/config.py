"""Recipes: YAML validated into frozen, typed configuration.

The keys follow Flow-GRPO's published recipes. An unknown key or an impossible value is refused
with its place in the file and, where there is one, the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from sfgrpo import credit, sde
from sfgrpo.names import unknown_name
from sfgrpo.recipe_text import RecipeError, explain, numbers, override


class Section(BaseModel):
    """A frozen group of keys; unknown ones are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Run(Section):
    output_dir: Path = Path("runs/default")
    """Where metrics, checkpoints, grids and the report go."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of all randomness; (seed, sample, step, element) decides every number drawn."""
    iterations: int = Field(default=100, ge=1)
    """Iterations of: sample, score, credit, update."""
    peer_timeout: float = Field(default=30, ge=1)
    """Seconds after which a machine that fell silent is given up and the run ends. A rank that
    dies, or whose machine says so, ends the run at once."""


class Model(Section):
    backbone: str = "sd3"
    """A file in sfgrpo/backbones: which family of pipelines `path` holds."""
    path: str = "embedded"
    """Local folder or hub id of a diffusers pipeline; "embedded" is the model in this package."""
    resolution: int = Field(default=32, ge=8)
    """Side of the square images, in pixels."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network in sampling and training; latents and densities stay fp32."""
    max_sequence_length: int = Field(default=256, ge=0)
    """Length of the T5 prompt embedding; 0 where the pipeline has no third text encoder."""


class Lora(Section):
    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)


class Sample(Section):
    sampler: str = "ddim"
    """ "ode", "flow", "dance", "ddim", "cps" or "renoise"; training needs one with noise."""
    num_steps: int = Field(default=10, ge=1)
    """T, sampling steps of a training trajectory."""
    eta: float = Field(default=0.7, ge=0)
    """Stochasticity of the sampler."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 runs the conditional branch alone."""
    prompts_per_iteration: int = Field(default=8, ge=1)
    """P, groups of one iteration."""
    group_size: int = Field(default=12, ge=2)
    """N, trajectories per prompt."""
    batch_size: int = Field(default=96, ge=1)
    """Rows of one forward in sampling."""

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in sde.SAMPLERS:
            raise ValueError(unknown_name("sampler", name, sde.SAMPLERS))
        if name == "ode":
            raise ValueError("'ode' draws no noise, so there is no policy to train; use 'ddim'")
        return name


class Credit(Section):
    rule: str = "stepwise"
    """ "stepwise" (gains of clean estimates) or "uniform" (Flow-GRPO)."""
    normalize: Literal["joint", "per_step", "centered"] = "joint"
    """Over what mean and std of the gains are taken."""
    estimate_substeps: int = Field(default=5, ge=1)
    """T', ODE substeps of a clean estimate; 1 is the plain Tweedie projection."""
    stride: int = Field(default=1, ge=1)
    """Gains over blocks of this many steps."""
    statistics: Literal["trainable", "all"] = "trainable"
    """Whether noise-free steps enter mean and std."""
    clamp: float | None = Field(default=5.0, gt=0)
    """Limit of |advantage|."""

    @field_validator("rule")
    @classmethod
    def _known(cls, name: str) -> str:
        credit.get(name)
        return name


class Train(Section):
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
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
    updates_per_iteration: int = Field(default=1, ge=1)
    """Optimiser steps an iteration's rows are split over, each row used once."""
    micro_batch_size: int = Field(default=96, ge=1)
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
    """Largest mean |logp in training - logp at sampling| before an iteration's first update; null
    is half of clip_range: see `sfgrpo.guard`."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay per optimiser step of the averaged weights that are evaluated; 0 switches it off."""


class Eval(Section):
    every: int = Field(default=10, ge=1)
    """Iterations between evaluations; the first and the last state are always evaluated."""
    num_steps: int = Field(default=10, ge=1)
    """ODE steps."""
    images_per_prompt: int = Field(default=4, ge=2)
    """Images from fixed noise that training never draws."""
    prompts: int = Field(default=40, ge=1)
    """Held-out noise is shown on this many prompts, spread evenly over the prompt file."""
    judges: tuple[str, ...] = ()
    """Measures that training never sees, as "module:function"."""


class Checkpoint(Section):
    every: int = Field(default=10, ge=1)
    """Iterations between checkpoints; the last state is always saved."""
    keep: int = Field(default=2, ge=1)
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


class Recipe(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: Model = Model()
    lora: Lora | None = Lora()
    """Null trains all weights of the transformer."""
    prompts: str = "embedded"
    """JSONL file, one {"prompt": ..., any metadata the rewards read} a line, or a text file with
    a prompt a line; "embedded" is the set of the embedded model."""
    reward: dict[str, float] = {"ocr": 0.8, "colour": 0.2}
    """Weights of the mixed rewards; names are files in sfgrpo/rewards or "module:function"."""
    sample: Sample = Sample()
    credit: Credit = Credit()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    deepspeed: Deepspeed = Deepspeed()


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    folder = resources.files("sfgrpo.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def _source(recipe: str) -> str:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"recipe file '{recipe}' does not exist")
        return path.read_text(encoding="utf-8")
    if recipe not in recipe_names():
        raise RecipeError(unknown_name("recipe", recipe, recipe_names()) + "; or give a .yaml file")
    return (resources.files("sfgrpo.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")


def load(recipe: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: name of a recipe in this package, or path of a .yaml file.
        overrides: `(dotted key, YAML value)` pairs that replace the file's.

    Raises:
        RecipeError: with one line per wrong key.
    """
    try:
        data = numbers(yaml.safe_load(_source(recipe)) or {})
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe '{recipe}' is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe '{recipe}' must be a mapping of sections, got {type(data).__name__}"
        )
    for key, value in overrides:
        override(data, key, value)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe)) from None
