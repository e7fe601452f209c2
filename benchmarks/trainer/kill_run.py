"""Kill a run again and again, and see whether it ends like one that was left alone.

    python -m benchmarks.trainer.kill_run --kills 50 --folder kills

A tiny recipe runs as a process of its own. It is killed with SIGKILL at random moments, half of
them while it writes or removes a checkpoint, and started again by the same command. At the end its
logs and every file of its last checkpoint (weights, averages, optimiser, state) must be those of a
run that was not disturbed. Exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sfgrpo import config
from sfgrpo.run import checkpoints
from sfgrpo.run.checkpoints import Checkpoints
from tests.support import tiny


class Run:
    """The process of a recipe and the folder it writes to."""

    def __init__(self, home: Path, name: str, iterations: int) -> None:
        self.folder, self.output = home / name, home / f"{name}.log"
        self.checkpoints = self.folder / "checkpoints"
        keys = {
            **tiny.SMALL,
            "model.path": str(home / "pipeline"),
            "prompts": str(home / "prompts.jsonl"),
            "run.output_dir": str(self.folder),
            "run.iterations": str(iterations),
            "eval": "{every: 3, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
            "checkpoint": "{every: 2, keep: 2, keep_best: true}",
        }
        recipe = config.load("embedded", list(keys.items()))
        self.recipe = home / f"{name}.yaml"
        self.recipe.write_text(json.dumps(recipe.model_dump(mode="json")))

    def start(self) -> None:
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sfgrpo.train", str(self.recipe)],
                env={**os.environ, "PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu"},
                stdout=output, stderr=output,
            )  # fmt: skip

    def alive(self) -> bool:
        return self.process.poll() is None

    def trains(self) -> bool:
        """Whether the process has loaded everything: TensorBoard's file carries its number."""
        files = self.folder.glob(f"tensorboard/*.{self.process.pid}.*")
        return next(files, None) is not None

    def size(self) -> int:
        """Bytes of metrics; they grow with every iteration."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def grew(self, size: int) -> bool:
        return self.size() != size

    def holds(self, prefix: str) -> bool:
        """Whether some folder of checkpoints is called so."""
        found = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        return any(name.startswith(prefix) for name in found)

    def wait(self, until: Callable[[], bool]) -> None:
        """Until it comes about or the process ends."""
        while self.alive() and not until():
            time.sleep(0.0005)


KINDS = ("start", "iteration", "writing", "removing")
"""While the process starts; anywhere; while a checkpoint is written; while it replaces another."""


def kill(run: Run, kind: str, draw: random.Random, startup: float) -> str | None:
    """Kill the run at a moment of this kind; returns what the kill interrupted, None if the run
    was finished before."""
    if kind == "start":
        until = time.monotonic() + draw.random() * startup
        run.wait(lambda: time.monotonic() > until)
    else:
        run.wait(run.trains)
        for _ in range(draw.randrange(4)):
            run.wait(partial(run.grew, run.size()))
    if kind == "iteration":
        time.sleep(draw.random())
    elif kind == "writing":
        name = draw.choice(("writing-0", "writing-best"))
        run.wait(lambda: run.holds(name))
        time.sleep(draw.random() * 0.15)
    elif kind == "removing":
        name = draw.choice(("removing-0", "removing-best"))
        run.wait(lambda: run.holds(name))
        time.sleep(draw.random() * 0.001)
    loaded = run.trains()
    run.process.kill()
    if run.process.wait() == 0:
        return None
    if run.holds("removing-"):
        return "replacing an older checkpoint"
    if run.holds("writing-"):
        return "writing a checkpoint"
    return "sampling, training, evaluating" if loaded else "starting"


def contents(path: Path) -> Any:
    """What a file says. Two writings of the same tensors need not be the same bytes: peft's
    description of a LoRA holds a set, a pickle depends on which objects are shared."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, weights_only=False)  # the run's own file
    return path.read_bytes()


def equal(one: Any, two: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def differences(one: Path, two: Path) -> list[str]:
    """Files of two finished runs that differ: logs, last checkpoint, best weights."""
    last = sorted((one / "checkpoints").glob("0*"))[-1].name
    names = {Path("metrics.jsonl"), Path("eval.jsonl")}
    for folder in (one, two):
        for part in (last, "best"):
            found = (folder / "checkpoints" / part).rglob("*")
            names |= {path.relative_to(folder) for path in found if path.is_file()}
    return [str(name) for name in sorted(names) if not same(one / name, two / name)]


def same(one: Path, two: Path) -> bool:
    """Whether both files exist and say the same."""
    if not (one.exists() and two.exists()):
        return False
    # A manifest sums bytes, see `contents`.
    return one.name == checkpoints.MANIFEST or equal(contents(one), contents(two))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iterations", type=int, help="of the run; default: four per kill")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    home, draw = given.folder.resolve(), random.Random(given.seed)
    tiny.build_pipeline(home / "pipeline")
    tiny.write_prompts(home / "prompts.jsonl")
    iterations = given.iterations or 4 * given.kills
    whole, cut = (Run(home, name, iterations) for name in ("whole", "cut"))
    since = time.monotonic()
    whole.start()
    whole.wait(whole.trains)
    startup = time.monotonic() - since
    whole.process.wait()

    counts, kills = Counter(), 0
    while kills < given.kills:
        kind = draw.choice(KINDS)
        cut.start()
        if (interrupted := kill(cut, kind, draw, startup)) is None:
            break
        kills += 1
        counts[interrupted] += 1
        saved = [path.name for path in Checkpoints(cut.checkpoints, keep=2).saved()]
        print(f"kill {kills:>3}: {interrupted}; checkpoints {' '.join(saved)}", flush=True)
    cut.start()
    status = cut.process.wait()

    differ = differences(whole.folder, cut.folder) if status == 0 else ["the run did not finish"]
    warned = cut.output.read_text(errors="replace").count("damaged checkpoint")
    print(f"\n{'kill while':<32}count")
    for name, count in counts.most_common():
        print(f"{name:<32}{count:>5}")
    print(f"{'all':<32}{kills:>5}\n")
    print(f"checkpoints found damaged: {warned}")
    print(f"differences to the undisturbed run: {', '.join(differ) or 'none'}")
    return 1 if differ or warned or kills < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
