"""`sfgrpo evaluate RUN`: the policy of a checkpoint, measured again in another way.

With more steps, other prompts, another reward or size than the run's own evaluations had. The run
itself is only read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfgrpo import config, engine, evaluate, files, standing
from sfgrpo.config import Recipe, RecipeError
from sfgrpo.guard import Guard
from sfgrpo.names import JUDGE
from sfgrpo.run import checkpoints, records, samples
from sfgrpo.run.checkpoints import Checkpoints
from sfgrpo.run.randomness import reseed

START, NEWEST, BEST = "start", "newest", "best"
"""What `--checkpoint` takes beside an iteration."""
FREE = re.compile(
    r"eval\.|reward(_options|_frames)?(\.|$)|prompts$"
    r"|model\.(resolution|num_frames|attention|decode_batch|vae_tiling|vae_slicing|text_encoders"
    r"|prompt_cache)$"
    r"|sample\.(guidance_scale|negative_prompt|embedded_guidance|batch_size)$"
)
"""Keys that say how to measure a policy; the others say which policy it is, or how it was made."""
UNUSED = ("eval.every",)
AS_TRAINED = "as_trained"
"""The folder of an evaluation that changes nothing."""
LONGEST = 100
"""Characters of a folder's name; what is cut off is told apart by a hash."""


def main(
    run: Path,
    overrides: Sequence[tuple[str, str]],
    *,
    checkpoint: str,
    out: Path | None,
    machines: bool,
) -> int:
    """Print the numbers beside the run's own, and keep them with the images in `out`.

    Raises:
        ValueError: no such run, checkpoint or key, or a checkpoint that is damaged.
        OSError: a model or a file that is not there, or `out` cannot be written.
    """
    recipe = _recipe(run, overrides)
    iteration, weights = chosen(run, checkpoint)
    place = out or run / "evaluations" / _name(overrides)
    if engine.rank() == 0:
        files.writable(place)
    judges = [JUDGE.bind(name, recipe.eval.judge_options.get(name)) for name in recipe.eval.judges]
    found = standing.prepare(
        recipe, lambda split: evaluate.chosen(split.evaluation, recipe.eval.prompts)
    )
    if weights is not None:
        found.field.backbone.restore(weights)
    reseed(recipe.run.seed, iteration, engine.rank())
    result = evaluate.of_recipe(
        recipe, found.field, found.prompts, found.reward, judges, Guard(recipe),
        iteration=iteration,
        latent_shape=found.field.backbone.latent_shape(*recipe.eval_size),
    )  # fmt: skip
    if engine.rank() != 0:
        return 0
    _keep(place, iteration, result, dict(overrides))
    if machines:
        print(json.dumps({"iteration": iteration, **result.numbers}))
        return 0
    logged = {row["iteration"]: row for row in records.read(run / "eval.jsonl")}
    print(_table(result.numbers, logged.get(iteration, {}), iteration))
    print(f"\n{place}")
    return 0


def _recipe(run: Path, overrides: Sequence[tuple[str, str]]) -> Recipe:
    for key, _ in overrides:
        if not FREE.match(key) or key in UNUSED:
            raise ValueError(
                f"--{key}: says nothing about how a finished policy is measured; keys that do are "
                "those of eval and reward, prompts, model.resolution, sample.guidance_scale and "
                "their like"
            )
    return trained_with(run, overrides)


def trained_with(run: Path, overrides: Sequence[tuple[str, str]]) -> Recipe:
    """The recipe of a run, with other values of some keys.

    Raises:
        ValueError: there is no run in the folder, or a wrong key or value.
    """
    described = run / "recipe.yaml"
    if not described.is_file():
        raise ValueError(f"'{run}' holds no run: there is no recipe.yaml")
    try:
        return config.load(str(described), overrides)
    except RecipeError as error:
        raise ValueError(f"'{described}': {error}") from error


def chosen(run: Path, checkpoint: str) -> tuple[int, Path | None]:
    """The iteration of a run's checkpoint, and the folder of its weights; None is what training
    started from.

    Raises:
        ValueError: there is no such checkpoint (naming those there are), or it is damaged.
    """
    if checkpoint == START:
        return 0, None
    folder = run / "checkpoints"
    saved = {int(path.name): path for path in Checkpoints(folder, keep=1).saved()}
    if checkpoint == BEST and (folder / BEST).is_dir():
        path = folder / BEST
        iteration = json.loads((path / "best.json").read_text(encoding="utf-8"))["iteration"]
    elif checkpoint == NEWEST and saved:
        iteration = max(saved)
        path = saved[iteration]
    elif checkpoint.isdecimal() and int(checkpoint) in saved:
        iteration = int(checkpoint)
        path = saved[iteration]
    else:
        there = [START, *map(str, saved), *([BEST] if (folder / BEST).is_dir() else [])]
        raise ValueError(f"--checkpoint {checkpoint}: '{run}' has {', '.join(there)}")
    if problems := checkpoints.damage(path):
        raise ValueError(f"'{path}' is damaged: {', '.join(problems)}")
    return iteration, path / "model"


def _name(overrides: Sequence[tuple[str, str]]) -> str:
    """A folder's name that says what is other than in training."""
    told = ",".join(f"{key}={value}" for key, value in sorted(dict(overrides).items()))
    plain = re.sub(r"[^\w.,=+-]+", "_", told)
    if len(plain) > LONGEST:
        plain = f"{plain[:LONGEST]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return plain or AS_TRAINED


def _keep(
    place: Path, iteration: int, result: evaluate.Evaluation, changed: Mapping[str, str]
) -> None:
    """Images as a run keeps them; numbers in `eval.jsonl`, one line per iteration."""
    samples.save_samples(place, iteration, result)
    rows: dict[int, Any] = {row["iteration"]: row for row in records.read(place / "eval.jsonl")}
    rows[iteration] = {"iteration": iteration, **result.numbers, "changed": changed}
    lines = "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows))
    files.write(place / "eval.jsonl", lines)


def _table(now: Mapping[str, float], logged: Mapping[str, float], iteration: int) -> str:
    lines = [f"{f'iteration {iteration}':24} {'in the run':>12} {'now':>12}"]
    for name, value in now.items():
        before = f"{logged[name]:.4f}" if name in logged else "-"
        lines.append(f"{name:24} {before:>12} {value:>12.4f}")
    return "\n".join(lines)
