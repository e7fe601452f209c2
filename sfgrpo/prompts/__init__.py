"""Prompts: files and folders of them, sets in this package, and which an iteration draws."""

from sfgrpo.prompts.prompt import Prompt, Split, digest, fingerprint
from sfgrpo.prompts.sources import BUILTIN, draw, load, split, spread

__all__ = ["BUILTIN", "Prompt", "Split", "digest", "draw", "fingerprint", "load", "split", "spread"]
