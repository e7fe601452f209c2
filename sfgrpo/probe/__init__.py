"""`sfgrpo probe RECIPE`: how good the credit signal is, before a run.

Samples trajectories of the untrained policy once, and takes the clean estimates of their states by
every solver: how well do the advantages agree with those of the exact ODE, at what cost, and which
steps decide the final reward? No run folder is made or touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(
    recipe: str, overrides: Sequence[tuple[str, str]], *, prompts: int, out: Path, machines: bool
) -> int:
    """Print the tables, or with `machines` the JSON; write `probe.json` and `probe.png` to `out`.

    Raises:
        ValueError: the recipe is wrong, or there is nothing to measure in it.
        OSError: a model or a file that is not there, or `out` cannot be written.
    """
    if prompts < 1:
        raise ValueError(f"--prompts: must be at least 1, got {prompts}")
    from tqdm import tqdm

    from sfgrpo import files
    from sfgrpo.config import load
    from sfgrpo.probe import experiment, findings, picture, text

    asked = load(recipe, overrides)
    out.mkdir(parents=True, exist_ok=True)  # what is in the way is said before the work
    with tqdm(unit="row", unit_scale=True, desc="loading", dynamic_ncols=True) as bar:
        probe = findings.Probe(experiment.prepare(asked, prompts, bar.update))
        bar.reset(total=probe.work)
        found = probe.run(bar.set_description)
    tree = json.dumps(_plain(asdict(found)), indent=2, allow_nan=False)
    files.write(out / "probe.json", tree + "\n")
    picture.draw(found, out / "probe.png")
    print(tree if machines else text.as_text(found))
    if not machines:
        print(f"\n{out / 'probe.json'}\n{out / 'probe.png'}")
    return 0


def _plain(value: Any) -> Any:
    """Without nan, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
