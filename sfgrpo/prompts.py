"""Prompt files, and which prompts an iteration draws."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its rewards need to know (target text, colours, ...)."""

    text: str
    metadata: dict[str, Any]


def _parse(line: str, number: int, source: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{source}, line {number}: expected an object with a text "prompt"')
    return Prompt(record.pop("prompt"), record)


def load(source: str) -> list[Prompt]:
    """Read a `.jsonl` file (prompt and metadata) or a `.txt` file (a prompt a line).

    "embedded" is the prompt set of the embedded model. Blank lines are passed over.

    Raises:
        ValueError: names the file, and the line where there is one.
    """
    if source == "embedded":
        text = (resources.files("sfgrpo.embedded") / "prompts.jsonl").read_text(encoding="utf-8")
    elif Path(source).is_file():
        text = Path(source).read_text(encoding="utf-8")
    else:
        raise ValueError(f"prompts: file '{source}' does not exist")
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts: '{source}' holds no prompt")
    if source == "embedded" or source.endswith(".jsonl"):
        return [_parse(line, n, source) for n, line in lines]
    return [Prompt(line, {}) for _, line in lines]


def draw(count: int, available: int, *, seed: int, iteration: int) -> list[int]:
    """Which prompts iteration `iteration` uses: each once per pass, each pass in its own order.

    A function of its arguments alone, so a resumed run draws what the first would have.
    """
    drawn: list[int] = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, available)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        drawn.append(int(torch.randperm(available, generator=generator)[place]))
    return drawn


def spread(count: int, available: int) -> list[int]:
    """`count` prompts spread evenly over the file, the same every time."""
    return torch.linspace(0, available - 1, min(count, available)).round().long().tolist()
