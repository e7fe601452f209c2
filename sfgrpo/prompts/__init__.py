"""Prompts: files and folders of them, sets in this package, and which an iteration draws."""

from sfgrpo.prompts.sources import BUILTIN, Prompt, Split, draw, load, split, spread

__all__ = ["BUILTIN", "Prompt", "Split", "draw", "load", "split", "spread"]
