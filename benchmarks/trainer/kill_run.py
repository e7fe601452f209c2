"""Kill a run again and again, and see whether it ends like one that was left alone.

    python -m benchmarks.trainer.kill_run --kills 50 --folder kills
    python -m benchmarks.trainer.kill_run --kills 10 --ranks 2 --stage 0 1 2 3

A tiny recipe runs as a process of its own, or one per rank. One of them is killed with SIGKILL at
random moments, half of them while it writes or removes a checkpoint; the others have to end by
themselves, and the same command starts the run again. At the end its logs and every file of its
last checkpoint (weights, averages, optimiser, state) must be those of a run that was not disturbed.
Exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """The processes of a recipe and the folder it writes to."""

    def __init__(self, home: Path, name: str, iterations: int, *, ranks: int, stage: int) -> None:
        self.ranks, self.processes = ranks, list[subprocess.Popen[bytes]]()
        self.folder, self.output = home / name, home / f"{name}.log"
        self.checkpoints = self.folder / "checkpoints"
        keys = {
            **tiny.SMALL,
            "model.path": str(home / "pipeline"),
            "prompts": str(home / "prompts.jsonl"),
            "run.output_dir": str(self.folder),
            "run.iterations": str(iterations),
            "deepspeed.zero_stage": str(stage),
            "eval": "{every: 3, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
            "checkpoint": "{every: 2, keep: 2, keep_best: true}",
        }
        recipe = config.load("embedded", list(keys.items()))
        self.recipe = home / f"{name}.yaml"
        self.recipe.write_text(json.dumps(recipe.model_dump(mode="json")))

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu"}
        if self.ranks > 1:
            environment |= {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(free_port())
        with self.output.open("ab") as output:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "sfgrpo.train", str(self.recipe)],
                    env=environment | ({"RANK": str(rank)} if self.ranks > 1 else {}),
                    stdout=output, stderr=output,
                )
                for rank in range(self.ranks)
            ]  # fmt: skip

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def end(self) -> list[int]:
        """The exit statuses; ranks that wait for one that was killed have to end by themselves."""
        return [process.wait(300) for process in self.processes]

    def trains(self) -> bool:
        """Whether rank 0 has loaded everything: TensorBoard's file carries its number."""
        files = self.folder.glob(f"tensorboard/*.{self.processes[0].pid}.*")
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
    """Kill a rank at a moment of this kind; returns what the kill interrupted, None if the run
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
    # Ranks that have not met yet are their launcher's to end.
    for process in [draw.choice(run.processes)] if loaded else run.processes:
        process.kill()
    if not any(run.end()):
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
    """Bit for bit, through dicts, lists and objects that know no equality."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    identity = type(one) is type(two) and type(one).__eq__ is object.__eq__
    if identity and hasattr(one, "__dict__"):  # DeepSpeed's LossScaler
        return equal(vars(one), vars(two))
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


def campaign(home: Path, kills: int, iterations: int, *, ranks: int, stage: int, seed: int) -> bool:
    """Kill runs of one kind `kills` times, and report; returns whether all was well."""
    draw = random.Random(seed)
    names = (f"whole-{ranks}-{stage}", f"cut-{ranks}-{stage}")
    whole, cut = (Run(home, name, iterations, ranks=ranks, stage=stage) for name in names)
    since = time.monotonic()
    whole.start()
    whole.wait(whole.trains)
    startup = time.monotonic() - since
    whole.end()

    counts, done = Counter(), 0
    while done < kills:
        kind = draw.choice(KINDS)
        cut.start()
        if (interrupted := kill(cut, kind, draw, startup)) is None:
            break
        done += 1
        counts[interrupted] += 1
        saved = [path.name for path in Checkpoints(cut.checkpoints, keep=2).saved()]
        print(f"kill {done:>3}: {interrupted}; checkpoints {' '.join(saved)}", flush=True)
    cut.start()
    finished = not any(cut.end())

    differ = differences(whole.folder, cut.folder) if finished else ["the run did not finish"]
    warned = cut.output.read_text(errors="replace").count("damaged checkpoint")
    print(f"\n{'kill while':<32}count")
    for name, count in counts.most_common():
        print(f"{name:<32}{count:>5}")
    print(f"{'all':<32}{done:>5}\n")
    print(f"checkpoints found damaged: {warned}")
    print(
        f"ranks {ranks}, ZeRO stage {stage}: {done} of {kills} kills; differences to the "
        f"undisturbed run: {', '.join(differ) or 'none'}",
        flush=True,
    )
    return not (differ or warned or done < kills)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="at each stage")
    parser.add_argument("--iterations", type=int, help="of the run; default: four per kill")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, nargs="+", default=[0], help="ZeRO stages")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    home = given.folder.resolve()
    tiny.build_pipeline(home / "pipeline")
    tiny.write_prompts(home / "prompts.jsonl")
    well = [
        campaign(
            home, given.kills, given.iterations or 4 * given.kills,
            ranks=given.ranks, stage=stage, seed=given.seed,
        )
        for stage in given.stage
    ]  # fmt: skip
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
