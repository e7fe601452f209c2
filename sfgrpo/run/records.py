"""What a run leaves behind on disk, and how it comes back after a crash.

metrics.jsonl   one line per iteration: numbers that depend on the recipe and the number of ranks
                alone, so a resumed run writes the same bytes as one that was never stopped
eval.jsonl      one line per evaluation: means, and the signs of `sfgrpo.run.alarms`
eval_prompts.jsonl  one line per evaluation: the mean scores of each prompt, in the order of
                images/prompts.txt; null where no image of a prompt has a finite reward
timing.jsonl    seconds and share of each phase of an iteration (these do differ between runs)
recipe.yaml     the validated recipe
started_in.json the folder in which it was started, see `sfgrpo.run.origin`
checkpoints/    see `sfgrpo.run.checkpoints`
strips/         see `sfgrpo.run.strips`
tracking/       see `sfgrpo.run.tracking`
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sfgrpo import files
from sfgrpo.names import in_one_line

if TYPE_CHECKING:  # reading a run takes no PyTorch
    from sfgrpo.config import Recipe

STARTED_IN = "started_in.json"
LOGS = ("metrics.jsonl", "eval.jsonl", "eval_prompts.jsonl", "timing.jsonl")
BETWEEN = ("evaluate", "checkpoint")
"""Phases of timing.jsonl that do not belong to an iteration's work on its images."""
SAMPLES = ("images", "samples", "videos", "strips")
"""Folders of what is kept of evaluations."""
NUMBER = re.compile(r"\d{6,}")
"""The name of a checkpoint: its iteration."""
OURS = {
    "images": r"\d{6,}\.png|prompts\.txt",
    "samples": r"\d{6,}\.safetensors|prompts\.txt",
    "videos": r"\d{6,}-\d+\.webp",
    "evaluations": r"as_trained|[a-z_.]+=.*",
    "strips": r"\d{6,}\.(png|json)",
    "tracking": r"id|wandb|swanlab",
    "tensorboard": r"events\.out\.tfevents\..+",
    "checkpoints": r"((writing|removing|damaged)-)?(\d{6,}|best)(-\d+)?",
}
"""Folder -> the names of what a run puts into it."""
FREE = {
    "run.iterations", "run.output_dir", "run.peer_timeout", "run.track", "run.track_options",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "train.on_nonfinite", "train.drift_budget",
    "reward_ahead", "reward_retries", "reward_timeout", "on_reward_failure",
    "deepspeed.zero_stage", "model.context_parallel",
}  # fmt: skip
"""Keys that a run may change when it continues: how long, where, shared how, and what stops it."""
REMOTE = r"reward_options\.(http|vlm)(/[^.]+)?"
SERVERS = re.compile(
    REMOTE + r"\.(url|token_env|token_file|in_flight|connect_timeout|timeout|retries|backoff)"
)
"""Likewise: where the servers of a reward are and how they are asked, not for what."""


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says what to do."""


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def prepare(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make `folder` ready for this recipe: new, or the same recipe's earlier run.

    `fresh` removes an earlier run's files, only what this package wrote. A run that finished no
    iteration gives way to another recipe without it.

    Raises:
        RunError: the folder holds the run of another recipe, or what is no run of this package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    there = [name for name in (*LOGS, *OURS) if (folder / name).exists()]
    if there and not described.exists():
        raise RunError(
            f"'{folder}' holds {', '.join(there)} but no recipe.yaml, so it is no run of sfgrpo; "
            "nothing in it was touched: choose another --run.output_dir"
        )
    if fresh:
        discard(folder)
    if changed := differences(folder, recipe):
        if begun(folder):
            raise RunError(
                f"'{folder}' holds a run of another recipe ({', '.join(changed)}); "
                "choose another --run.output_dir, or start over with --fresh"
            )
        described.unlink()
    for place in (folder, *(folder / name for name in SAMPLES)):
        files.clean(place)
    if not described.exists():
        files.write(described, text)


def differences(folder: Path, recipe: Recipe) -> list[str]:
    """In which keys this recipe is not the one of the run in `folder`, as a message tells them; the
    keys in `FREE` aside. None where there is no run.

    Raises:
        RunError: the recipe there cannot be read.
    """
    described = folder / "recipe.yaml"
    if not described.exists():
        return []
    old, new = _filled(_stored(described), recipe), recipe.model_dump(mode="json")
    return [f"{key}: {there!r} there, {here!r} here" for key, there, here in _changed(old, new)]


def newest(folder: Path) -> int | None:
    """The iteration of a run's newest complete checkpoint; None if there is none."""
    saved = folder / "checkpoints"
    names = [path.name for path in saved.iterdir()] if saved.is_dir() else []
    return max((int(name) for name in names if NUMBER.fullmatch(name)), default=None)


def begun(folder: Path) -> bool:
    """Whether a run finished an iteration there."""
    return newest(folder) is not None or bool(read(folder / "metrics.jsonl"))


def discard(folder: Path) -> None:
    """Remove what a run of this package left in its folder, and nothing else.

    A folder of ours that is a link is emptied where it points to, and stays.
    """
    for name, pattern in OURS.items():
        place = folder / name
        for path in list(place.iterdir()) if place.is_dir() else ():
            if not re.fullmatch(pattern, path.name) or path.is_symlink():
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
    # The recipe goes last: stopped in between, what is left is still that recipe's.
    for name in (*LOGS, "report.html", "failure.txt", STARTED_IN, "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)


def identity(recipe: Recipe) -> str:
    """A hash of all that decides a run: keys that are not `FREE` and not at their defaults, so that
    a key which a later version adds changes nothing."""
    return _hashed(recipe.model_dump(mode="json"), recipe)


def identities(recipe: Recipe) -> set[str]:
    """What `identity` says in checkpoints of this recipe: before a run could change its ZeRO stage,
    one that was not the default counted."""
    found, said = {identity(recipe)}, recipe.model_dump(mode="json")
    for stage in (1, 2, 3):
        said["deepspeed"]["zero_stage"] = stage
        found.add(_hashed(said, recipe, FREE - {"deepspeed.zero_stage"}))
    return found


def _hashed(said: dict[str, Any], recipe: Recipe, free: Collection[str] = FREE) -> str:
    defaults = type(recipe)().model_dump(mode="json")
    decisive = [(key, new) for key, _, new in _changed(defaults, said, free=free)]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_logs(folder: Path, saved: int | None, every: int) -> None:
    """Whether the logs fit to the newest checkpoint, that of iteration `saved`.

    Raises:
        RunError: iterations are logged after the first checkpoint was due (`every`), and there is
            none.
    """
    logged = [row["iteration"] for row in read(folder / "metrics.jsonl")]
    if saved is None and logged and max(logged) > every:
        raise RunError(
            f"'{folder}' has logs of {max(logged)} iterations but no checkpoint: restore one into "
            "checkpoints/, or start over with --fresh"
        )
    lost = sorted(set(range(1, (saved or 0) + 1)) - set(logged))
    if lost:
        told = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        warnings.warn(
            f"'{folder}/metrics.jsonl' lacks {len(lost)} of the {saved} iterations before the "
            f"checkpoint ({told}); the run goes on, its curves have a gap",
            stacklevel=2,
        )


def _stored(described: Path) -> Any:
    try:
        found = yaml.safe_load(described.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = in_one_line(error)
        raise RunError(f"'{described}' cannot be read: {said}") from None
    if not isinstance(found, dict):
        raise RunError(f"'{described}' is no recipe: it holds {type(found).__name__}")
    return found


def _filled(old: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """An earlier recipe with the keys it lacks, which later versions added, at their defaults."""
    defaults, sections = type(recipe)(), type(recipe).model_fields
    filled = {**defaults.model_dump(mode="json"), **old}
    for name in sections:
        section = getattr(defaults, name)
        if hasattr(section, "model_dump") and isinstance(old.get(name), dict):
            filled[name] = {**section.model_dump(mode="json"), **old[name]}
    return filled


def _changed(
    old: Any, new: Any, place: str = "", *, free: Collection[str] = FREE
) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of what differs, except the keys in `free` and of `SERVERS`."""
    if place in free:
        return []
    if re.fullmatch(REMOTE, place):  # key by key even beside none, so that servers do not count
        old, new = old or {}, new or {}
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            changed
            for k in keys
            for changed in _changed(old.get(k), new.get(k), f"{place}.{k}".strip("."), free=free)
        ]
    return [] if old == new or SERVERS.fullmatch(place) else [(place, old, new)]
