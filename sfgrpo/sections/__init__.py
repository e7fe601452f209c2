"""The sections of a recipe: every key, what it may be, and what it is for."""

from sfgrpo.sections.base import Count, Folder, Section, Source, both_sides
from sfgrpo.sections.model import Lora, Model
from sfgrpo.sections.run import Checkpoint, Eval, Run
from sfgrpo.sections.sample import Credit, Sample, Window
from sfgrpo.sections.train import Deepspeed, RateDecay, Train

__all__ = [
    "Checkpoint",
    "Count",
    "Credit",
    "Deepspeed",
    "Eval",
    "Folder",
    "Lora",
    "Model",
    "RateDecay",
    "Run",
    "Sample",
    "Section",
    "Source",
    "Train",
    "Window",
    "both_sides",
]
