"""A run, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from sfgrpo import names
from sfgrpo.sections.base import Count, Folder, Pixels, Section, Source


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

    track: tuple[str, ...] = ()
    """Where numbers go beside the run's own logs and TensorBoard: "wandb", "trackio", "swanlab", or
    "module:function" (`sfgrpo.track`)."""
    track_options: dict[str, dict[str, Any]] = Field(default={})
    """What a tracker takes, such as its project, by the tracker's name."""

    @field_validator("track")
    @classmethod
    def _known(cls, track: tuple[str, ...]) -> tuple[str, ...]:
        for name in track:
            names.TRACKER.check(name)
        return track

    @model_validator(mode="after")
    def _of_trackers(self) -> Run:
        for name in self.track_options:
            if name not in self.track:
                text = names.unknown_name("tracker in track_options", name, self.track)
                raise ValueError(text)
        return self


class Eval(Section):
    every: Count = 10
    """Iterations between evaluations; the first and the last state are always evaluated."""
    num_steps: int = Field(default=10, ge=1, le=10_000)
    """ODE steps."""
    resolution: Pixels | None = None
    """Pixels of the images that evaluation makes, as model.resolution; null: that of training."""
    num_frames: Count | None = None
    """Frames of the videos that evaluation makes; null: model.num_frames."""
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
    judge_options: dict[str, dict[str, Any]] = Field(default={})
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
