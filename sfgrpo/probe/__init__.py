"""`sfgrpo probe RECIPE` or `RUN`: how good the credit signal is, before a run or after it.

Samples trajectories of a policy once, and takes the clean estimates of their states by every
solver: how well do the advantages agree with those of the exact ODE, at what cost, and which steps
decide the final reward? No run folder is made or touched.
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
    recipe: str,
    overrides: Sequence[tuple[str, str]],
    *,
    prompts: int,
    out: Path,
    machines: bool,
    checkpoint: str | None = None,
) -> int:
    """Print the tables, or with `machines` the JSON; write `probe.json` and `probe.png` to `out`.

    Args:
        recipe: its name or file, or the folder of a run; one of a recipe's name is written
            `./name`.
        checkpoint: of a run, as in `sfgrpo.saved`; None is the newest.

    Raises:
        ValueError: the recipe is wrong, or there is nothing to measure in it, or no such run or
            checkpoint.
        OSError: a model or a file that is not there, or `out` cannot be written.
    """
    if prompts < 1:
        raise ValueError(f"--prompts: must be at least 1, got {prompts}")
    from tqdm import tqdm

    from sfgrpo import files, saved
    from sfgrpo.config import load, recipe_names
    from sfgrpo.probe import experiment, findings, picture, text

    kept = None
    if Path(recipe).is_dir() and recipe not in recipe_names():
        asked = saved.trained_with(Path(recipe), overrides)
        kept = saved.chosen(Path(recipe), checkpoint or saved.NEWEST)
    else:
        asked = load(recipe, overrides)
        if checkpoint is not None:
            raise ValueError(f"--checkpoint {checkpoint}: '{recipe}' is no run's folder")
    files.writable(out)
    with tqdm(unit="row", unit_scale=True, desc="loading", dynamic_ncols=True) as bar:
        probe = findings.Probe(
            experiment.prepare(
                asked, prompts, bar.update, restore=kept.restore if kept else lambda _: 0
            )
        )
        bar.reset(total=probe.work)
        found = probe.run(bar.set_description)
    out.mkdir(parents=True, exist_ok=True)
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
