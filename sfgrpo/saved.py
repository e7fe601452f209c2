"""`sfgrpo evaluate RUN`: the policy of a checkpoint, measured again in another way.

With more steps, other prompts, another reward or size than the run's own evaluations had. The run
itself is only read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfgrpo import config, engine, evaluate, files, generator, standing
from sfgrpo.backbones.base import Backbone
from sfgrpo.config import Recipe, RecipeError
from sfgrpo.guard import Guard
from sfgrpo.names import JUDGE
from sfgrpo.run import checkpoints, origin, records, samples
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
    kept = chosen(run, checkpoint)
    place = out or run / "evaluations" / _name(overrides)
    if engine.rank() == 0:
        files.writable(place)
    judges = [JUDGE.bind(name, recipe.eval.judge_options.get(name)) for name in recipe.eval.judges]
    found = standing.prepare(
        recipe, lambda split: evaluate.chosen(split.evaluation, recipe.eval.prompts)
    )
    iteration = kept.restore(found.field.backbone)
    reseed(recipe.run.seed, iteration, engine.rank())
    result = evaluate.of_recipe(
        recipe, found.field, found.prompts, found.reward, judges, Guard(recipe),
        iteration=iteration, latent_shape=generator.shapes(recipe, found.field.backbone)[1],
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
    recipe = trained_with(run, overrides)
    for key in ("resolution", "num_frames"):
        if getattr(recipe.eval, key) is not None and f"model.{key}" in dict(overrides):
            raise ValueError(
                f"--model.{key}: changes nothing, since evaluation has eval.{key}; use --eval.{key}"
            )
    return recipe


def trained_with(run: Path, overrides: Sequence[tuple[str, str]]) -> Recipe:
    """The recipe of a run, with other values of some keys.

    Raises:
        ValueError: there is no run in the folder, or a wrong key or value, or what it names by
            relative paths is something else here.
    """
    described = run / "recipe.yaml"
    if not described.is_file():
        raise ValueError(f"'{run}' holds no run: there is no recipe.yaml")
    try:
        recipe = config.load(str(described), overrides)
    except RecipeError as error:
        raise ValueError(f"'{described}': {error}") from error
    origin.check(run, recipe, given=[key for key, _ in overrides])
    return recipe


@dataclass(frozen=True)
class Kept:
    """A checkpoint's weights, as they were found before the network was loaded."""

    run: Path
    asked: str
    """What `--checkpoint` says."""
    iteration: int
    weights: Path | None
    """The folder; None is what training started from."""

    def restore(self, backbone: Backbone) -> int:
        """Give the backbone these weights; returns their iteration, on all ranks that of rank 0.

        A run that is going on may have removed or replaced them since, or while they are read:
        then those that are asked for are chosen anew, the first time.

        Raises:
            ValueError: as `chosen`, or they were removed once more.
        """
        now = self if self._stands() else chosen(self.run, self.asked)
        now = engine.exchange(now)[0]
        if now.weights is None:
            return now.iteration
        try:
            backbone.restore(now.weights)
        except (OSError, ValueError):
            if now._stands():
                raise
        if not now._stands():
            raise ValueError(
                f"--checkpoint {self.asked}: the run has removed '{now.weights.parent}' while it "
                "was read; ask again, or let it keep more (checkpoint.keep)"
            )
        return now.iteration

    def _stands(self) -> bool:
        """Whether the weights are there, and still those of this iteration."""
        if self.weights is None:
            return True
        folder = self.weights.parent
        return _best(folder) == self.iteration if folder.name == BEST else folder.is_dir()


def chosen(run: Path, checkpoint: str) -> Kept:
    """What `--checkpoint` names of a run.

    Raises:
        ValueError: there is no such checkpoint (naming those there are), or it is damaged.
    """
    if checkpoint == START:
        return Kept(run, checkpoint, 0, None)
    folder = run / "checkpoints"
    saved = {int(path.name): path for path in Checkpoints(folder, keep=1).saved()}
    best = _best(folder / BEST)
    if checkpoint == BEST and best is not None:
        iteration, path = best, folder / BEST
    elif checkpoint == NEWEST and saved:
        iteration = max(saved)
        path = saved[iteration]
    elif checkpoint.isdecimal() and int(checkpoint) in saved:
        iteration = int(checkpoint)
        path = saved[iteration]
    else:
        there = [START, *map(str, saved), *([BEST] if best is not None else [])]
        raise ValueError(f"--checkpoint {checkpoint}: '{run}' has {', '.join(there)}")
    kept = Kept(run, checkpoint, iteration, path / "model")
    try:
        problems = checkpoints.damage(path)
    except FileNotFoundError:  # removed while it was read
        problems = []
    if problems and kept._stands():
        raise ValueError(f"'{path}' is damaged: {', '.join(problems)}")
    return kept


def _best(folder: Path) -> int | None:
    """The iteration of the best weights; None if there are none."""
    try:
        return json.loads((folder / "best.json").read_text(encoding="utf-8"))["iteration"]
    except FileNotFoundError:
        return None


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
    place.mkdir(parents=True, exist_ok=True)
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
