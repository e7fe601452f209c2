"""Recipes: YAML validated into frozen, typed configuration.

The keys follow Flow-GRPO's published recipes. An unknown key or an impossible value is refused
with its place in the file and, where there is one, the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sfgrpo import names
from sfgrpo.recipe_text import RecipeError, explain, override, put, read_file, refuse_mistaken
from sfgrpo.sections import (
    Checkpoint,
    Count,
    Credit,
    Deepspeed,
    Eval,
    Lora,
    Model,
    Run,
    Sample,
    Section,
    Source,
    Train,
    both_sides,
)

__all__ = ["Credit", "Lora", "Recipe", "RecipeError", "load", "recipe_names", "validated"]


class Recipe(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: Model = Model()
    lora: Lora | None = Lora()
    """Null trains all weights of the transformer."""
    prompts: Source = "embedded"
    """A .txt file with a prompt a line; a .jsonl, .json, .csv, .tsv or .parquet file, or the folder
    of a Hugging Face dataset, whose column "prompt", else "caption", else "text" (in any case or
    plural) is the prompt and whose others are metadata that rewards read; "embedded" and
    "numbers", the sets of the embedded models; "signs", 302 prompts that ask for text in an image;
    or "sign_edits", 192 that ask for another text on an image of a sign."""
    reward: dict[str, float] = Field(default={"ocr": 0.8, "colour": 0.2})
    """Weights of the mixed rewards; names are files in sfgrpo/rewards or "module:function", either
    of them several times with labels: "http/pick", "http/ocr"."""
    reward_options: dict[str, dict[str, Any]] = Field(default={})
    """Arguments of a reward's `build`, by the reward's name."""
    reward_frames: Count = 8
    """How many frames of a video a reward of images sees."""
    reward_ahead: int = Field(default=2, ge=0, le=1000)
    """Batches of samples that may wait for their rewards, which a thread of its own computes, while
    the next ones are made; 0 asks for each at once. Rewards see one call after the other."""
    reward_final_only: tuple[str, ...] = ()
    """Rewards that score final images alone, beside those that say so themselves: their share is
    credited to all noisy steps alike, and saves the scores of clean estimates."""
    reward_retries: int = Field(default=0, ge=0, lt=2**31)
    """How often a call of a reward is made again that raises, returns what are no scores, or scores
    that are not finite. Retried calls are counted in timing.jsonl."""
    reward_timeout: float | None = Field(default=None, gt=0, le=1e6)
    """Seconds after which a call of a reward in process that has not returned ends the run, naming
    the reward; what is saved stays as it is. Rewards that ask servers have timeouts of their
    own."""
    on_reward_failure: Literal["stop", "drop_group"] = "stop"
    """When a call fails in all attempts: save the last finished iteration and stop, naming prompt
    and reason; or go on without the groups of its prompts, as train.on_nonfinite does, and count
    them (`failed_groups` in metrics.jsonl). Scores that are not finite are train.on_nonfinite's."""
    sample: Sample = Sample()
    credit: Credit = Credit()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    deepspeed: Deepspeed = Deepspeed()

    @property
    def eval_size(self) -> tuple[int, int, int]:
        """(height, width, frames) of what evaluation makes."""
        height, width, frames = self.model.size
        if self.eval.resolution is not None:
            height, width = both_sides(self.eval.resolution)
        return height, width, self.eval.num_frames or frames

    @field_validator("reward", mode="before")
    @classmethod
    def _weights(cls, reward: Any) -> Any:
        for name, weight in reward.items() if isinstance(reward, dict) else ():
            try:
                refuse_mistaken(weight, float)
            except ValueError as error:
                raise ValueError(f"weight of '{name}': {error}, got {weight!r}") from None
        return reward

    @field_validator("reward")
    @classmethod
    def _rewards(cls, reward: dict[str, float]) -> dict[str, float]:
        for name in reward:
            names.REWARD.check(name)
        if not any(reward.values()):
            raise ValueError("needs a reward whose weight is not 0")
        return reward

    @model_validator(mode="after")
    def _final_only(self) -> Recipe:
        for name in self.reward_final_only:
            if name not in self.reward:
                text = names.unknown_name("reward", name, self.reward)
                raise ValueError(f"reward_final_only: {text}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.credit.stride > self.sample.num_steps:
            raise ValueError(
                f"credit.stride: {self.credit.stride} is more than the {self.sample.num_steps} "
                "steps of sample.num_steps"
            )
        window = self.sample.window
        if window and window.continuation == "solver" and self.credit.statistics == "all":
            raise ValueError(
                "credit.statistics: 'all' counts the gains of steps without noise, which are not "
                "sampled behind sample.window; use 'trainable', or window.continuation 'steps'"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Recipe:
        if self.model.compile_blocks and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "model.compile_blocks: does not go with deepspeed.zero_stage 3, which gathers each "
                "layer in hooks; use stage 2, or false"
            )
        return self


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    folder = resources.files("sfgrpo.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def _file(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_dir() and recipe not in recipe_names():
        inside = path / "recipe.yaml"
        hint = f"'{inside}'" if inside.is_file() else "a .yaml file, or a name of `sfgrpo recipes`"
        raise RecipeError(f"recipe '{recipe}' is a folder; give {hint}")
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"recipe file '{recipe}' does not exist")
        return path
    if recipe not in recipe_names():
        raise RecipeError(
            names.unknown_name("recipe", recipe, recipe_names()) + "; or give a .yaml file"
        )
    return Path(str(resources.files("sfgrpo.recipes") / f"{recipe}.yaml"))


def load(
    recipe: str,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: name of a recipe in this package, or path of a .yaml file.
        overrides: `(dotted key, YAML value)` pairs that replace the file's.
        values: dotted key -> value, of another file; they come before `overrides`.

    Raises:
        RecipeError: with one line per wrong key.
    """
    data = read_file(_file(recipe))
    for key, value in values.items():
        put(data, key, value)
    for key, value in overrides:
        override(data, key, value, Recipe)
    return validated(data)


def validated(data: Mapping[str, Any]) -> Recipe:
    """The recipe of these sections.

    Raises:
        RecipeError: with one line per wrong key.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe)) from None


def check_functions(recipe: Recipe) -> None:
    """Find the functions that a recipe names, and check what it gives them: `load` knows their
    names alone, for this imports their modules.

    Raises:
        ValueError: unknown name or option (with the nearest), or one that is missing.
    """
    sample, credit, judged = recipe.sample, recipe.credit, recipe.eval.judge_options
    names.SAMPLER.bind(sample.sampler, sample.sampler_options)
    names.SOLVER.bind(credit.solver, credit.solver_options)
    names.RULE.bind(credit.rule, credit.options)
    names.MIXTURE.bind(credit.mixture, credit.mixture_options)
    for name in recipe.eval.judges:
        names.JUDGE.bind(name, judged.get(name))
