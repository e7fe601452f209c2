"""Checkpoints that are whole or not there: written aside, summed, synced, renamed into place.

    000010/            the state after 10 iterations
        engine/        DeepSpeed's files: parameters, optimiser, loss scale, one share per rank
        ema.safetensors
        model/         what the stock pipeline loads
        state.json     `State`
        manifest.json  size and SHA-256 of every other file; written last
    best/              weights of the best evaluation so far (`checkpoint.keep_best`)
    writing-*          being written: a crash leaves it, the next start removes it
    removing-*         on its way out: likewise
    damaged-*          did not match its manifest; set aside for whoever wants to look

A folder gets its number by one rename, after all its files are on the disk, and loses it by one
before the first file is removed, so that a kill at any moment leaves numbered folders whole.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError

from sfgrpo import files
from sfgrpo.run.records import NUMBER

MANIFEST = "manifest.json"
STATE = "state.json"
LEFT = re.compile(r"(writing|removing)-(\d{6,}|best)")
"""What a kill leaves; a user's folder that only begins so is left alone."""
LAYOUT = 1
"""Number of this folder layout."""

Write = Callable[[Path], None]
"""What a rank puts into the folder of a checkpoint."""


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be continued; the message says what to do."""


@dataclass(kw_only=True)
class State:
    """What a run knows beside its weights.

    Not in it, since they follow from the recipe and the iteration: which prompts come next, the
    noise (counter based), the order of rows, and the seeds of torch's, numpy's and Python's
    generators, which are set anew for every iteration (`sfgrpo.run.randomness`).
    """

    iteration: int = 0
    """Finished iterations; the sampler's position."""
    evaluated: int | None = None
    """The last iteration that was evaluated."""
    best_reward: float | None = None
    """The highest mean reward of an evaluation,"""
    best_iteration: int | None = None
    """and the iteration it was reached at."""
    world: int = 1
    """Ranks that wrote the checkpoint."""
    zero_stage: int = 0
    """What they sharded."""
    recipe: str = ""
    """`records.identity` of the recipe it belongs to; "" in checkpoints of before there was one."""
    prompts: str = ""
    """`prompts.fingerprint` of the prompts it was trained on; likewise."""
    served: dict[str, str] = field(default_factory=dict)
    """Reward -> what its server served; likewise. A recipe tells no more than the address."""
    layout: int = LAYOUT


def refusal(
    state: State, *, zero_stage: int, recipe: Collection[str] = (), prompts: str = "",
    served: Mapping[str, str] = MappingProxyType({}),
) -> str | None:  # fmt: skip
    """Why this run cannot continue the checkpoint; None if it can, on any number of ranks.

    `zero_stage` is that of the run, `recipe` what `State.recipe` may be (`records.identities`).
    Stage 0 keeps every parameter and its optimiser whole, in one file that any number of ranks
    loads; from stage 1 on each rank writes a share, which is shared anew (`engine.resharding`).
    """
    if state.layout != LAYOUT:
        return f"it has layout {state.layout}, this version of sfgrpo reads layout {LAYOUT}"
    if state.recipe and recipe and state.recipe not in recipe:
        return "it belongs to a run of another recipe; remove it, or start over with --fresh"
    if state.prompts and prompts and state.prompts != prompts:
        return (
            "the prompts have changed since it was written; restore the file that `prompts` (or "
            "eval.prompts_from) names, or start over with --fresh"
        )
    for name in sorted(set(state.served) & set(served)):
        if state.served[name] != served[name]:
            return (
                f"the server of reward '{name}' served '{state.served[name]}' when it was written, "
                f"and serves '{served[name]}' now; start that one again, or start over with --fresh"
            )
    if state.zero_stage != zero_stage and 0 in (state.zero_stage, zero_stage):
        return (
            f"it was written at ZeRO stage {state.zero_stage}, this run is at {zero_stage}, and "
            "only stages 1 to 3 go on as one another; go on with --deepspeed.zero_stage "
            f"{state.zero_stage}"
        )
    return None


class Checkpoints:
    """The checkpoints of a run. Only rank 0 changes the folder; `main` says who that is."""

    def __init__(self, folder: Path, keep: int, *, main: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.main = main

    def path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration stands."""
        return self.folder / f"{iteration:06d}"

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = {int(p.name): p for p in paths if NUMBER.fullmatch(p.name)}
        return [
            path for iteration, path in sorted(found.items())
            if path == self.path(iteration) and path.is_dir() and not path.is_symlink()
        ]  # fmt: skip

    def clean(self) -> None:
        """Remove what a crash left half written or half removed (rank 0)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        former = self.folder / "removing-best"
        if former.exists() and not (self.folder / "best").exists():
            former.rename(self.folder / "best")
        for left in list(self.folder.iterdir()):
            if LEFT.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole (rank 0); damaged ones are set aside, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        found: dict[Path, list[str]] = {}
        for folder in reversed(self.saved()):
            problems = damage(folder)
            if not problems:
                self._set_aside(found, folder)
                return folder
            found[folder] = problems
        if found:
            raise CheckpointError(
                f"every checkpoint is damaged: {_told(found)}; restore one from a copy, or start "
                "over with --fresh"
            )
        return None

    def _set_aside(self, found: dict[Path, list[str]], used: Path) -> None:
        if not found:
            return
        for folder in found:
            aside, copies = folder.with_name(f"damaged-{folder.name}"), 1
            while aside.exists():
                copies += 1
                aside = folder.with_name(f"damaged-{folder.name}-{copies}")
            folder.rename(aside)
        warnings.warn(
            f"damaged checkpoint set aside as damaged-*: {_told(found)}; the run continues from "
            f"{used.name}",
            stacklevel=3,
        )

    def save(
        self, state: State, write: Callable[[Path], None], barrier: Callable[[], None]
    ) -> None:
        """Let every rank `write` into one folder; rank 0 makes it the checkpoint of the state."""
        text = json.dumps(asdict(state), indent=1)
        self._complete(self.path(state.iteration).name, write, STATE, text, barrier)
        if self.main:
            for old in self.saved()[: -self.keep]:
                self._remove(old)
        barrier()

    def save_best(self, state: State, write: Write, barrier: Callable[[], None]) -> None:
        """Replace `best` by the weights that every rank writes."""
        described = {"reward": state.best_reward, "iteration": state.best_iteration}
        self._complete("best", write, "best.json", json.dumps(described), barrier)
        barrier()

    def _complete(
        self, name: str, write: Write, file: str, text: str, barrier: Callable[[], None]
    ) -> None:
        """Publish a folder that every rank has written into, and rank 0 this file last."""
        aside = self._aside(name)
        barrier()
        with _telling(aside):
            write(aside)
        barrier()
        if self.main:
            with _telling(aside):
                files.write(aside / file, text)
                self._publish(aside, name)

    def _aside(self, name: str) -> Path:
        aside = self.folder / f"writing-{name}"
        if self.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        return aside

    def _publish(self, aside: Path, name: str) -> None:
        """Have the folder's files on the disk, describe them, give the folder its name."""
        files.sync_tree(aside)
        files.write(aside / MANIFEST, json.dumps({"files": sums(aside)}, indent=1))
        final, former = self.folder / name, self.folder / f"removing-{name}"
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
            final.rename(former)
        aside.rename(final)
        files.sync(self.folder)
        shutil.rmtree(former, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        former = folder.with_name(f"removing-{folder.name}")
        folder.rename(former)
        shutil.rmtree(former)


@contextmanager
def _telling(aside: Path) -> Iterator[None]:
    """CheckpointError for what keeps a checkpoint from being written, such as a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(aside.parent).free / 2**20
        raise CheckpointError(
            f"'{aside}' could not be written ({type(error).__name__}: {error}; {free:.0f} MiB are "
            "free there); those before it are whole: make room, and the same command continues"
        ) from error


def load_state(folder: Path) -> State:
    """The state of a checkpoint that is whole.

    Raises:
        CheckpointError: it is not what this version writes; names the key.
    """
    try:
        said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        unknown = sorted(set(said) - {field.name for field in fields(State)})
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"'{folder / STATE}' cannot be read: {error}") from error
    if unknown:
        raise CheckpointError(
            f"'{folder / STATE}' has the key '{unknown[0]}', which this version of sfgrpo does not "
            "know: continue with the version that wrote it"
        )
    return State(**said)


def sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by relative path."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
    return found


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: each file that does not match the manifest, and how."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in expected.items()}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]
    found, problems = sums(folder), []
    for name, (size, digest) in wanted.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name]["size"] != size:
            problems.append(f"{name} has {found[name]['size']} bytes, {size} were written")
        elif found[name]["sha256"] != digest:
            problems.append(f"{name} has other contents than were written (SHA-256)")
    return problems


def _told(found: dict[Path, list[str]]) -> str:
    return "; ".join(f"{folder}: {', '.join(problems)}" for folder, problems in found.items())
