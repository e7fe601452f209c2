"""A run of whose reward calls 30 % fail, against one whose reward never fails.

    python -m benchmarks.trainer.failing_rewards --json benchmarks/results/failing_rewards.json

A tiny recipe is trained with a reward in process, sound and then failing (it raises, returns nan,
too many scores or no numbers); and with the reward `http`, of one sound server and then of two that
fail likewise, one of which is killed and started again all the time. Each time the second run must
leave the bytes of the first: metrics.jsonl, eval.jsonl and all that the last checkpoint says. Exits
with 1 if it does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.trainer.kill_run import differences, free_port
from benchmarks.trainer.reward_server import serving
from sfgrpo import config, rewards
from sfgrpo.run import records
from sfgrpo.run.checkpoints import STATE
from sfgrpo.trainer import Trainer
from tests.support import tiny
from tests.support.rewards import failing

SELF = "benchmarks.trainer.failing_rewards:build"


class Reward:
    """How red an image is; a share of the calls fails."""

    calls = failed = 0

    def __init__(self, share: float) -> None:
        self.share, self.random = share, random.Random(5)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Any:
        Reward.calls += 1
        if self.random.random() < self.share:
            Reward.failed += 1
            return failing(self.random.randrange(4), len(images))
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def build(share: float = 0.0) -> rewards.Reward:
    """The reward, for a recipe or a server."""
    return Reward(share)


class Restarted:
    """A server that is killed and started again until the end."""

    def __init__(self, share: float, every: float) -> None:
        self.port, self.kills, self.over = free_port(), -1, threading.Event()
        self.url, self.first = f"http://127.0.0.1:{self.port}", threading.Event()
        self.thread = threading.Thread(target=self._run, args=(share, every))

    def _run(self, share: float, every: float) -> None:
        while not self.over.is_set():
            with serving(SELF, "--option", f"share={share}", port=self.port) as (_, process):
                self.first.set()
                self.kills += 1
                self.over.wait(every)
                process.kill()

    def __enter__(self) -> Restarted:
        self.thread.start()
        self.first.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def train(home: Path, name: str, iterations: int, reward: str, options: Mapping[str, Any]) -> Path:
    """A run of the tiny recipe; returns its folder."""
    keys = {
        **tiny.SMALL, "model.path": str(home / "pipeline"), "prompts": str(home / "prompts.jsonl"),
        "run.output_dir": str(home / name), "run.iterations": str(iterations),
        "reward": json.dumps({reward: 1}), "reward_options": json.dumps({reward: options}),
        "reward_retries": "40", "checkpoint": "{every: 100, keep: 1, keep_best: true}",
    }  # fmt: skip
    Trainer(config.load("embedded", list(keys.items()))).train()
    return home / name


def row(name: str, sound: Path, folder: Path) -> dict[str, Any]:
    """What came of a run."""
    for run in (sound, folder):  # the hash of the recipe, which names another reward
        for path in run.glob(f"checkpoints/*/{STATE}"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": ""}))
    retried = sum(row.get("reward_retries", 0) for row in records.read(folder / "timing.jsonl"))
    return {"run": name, "sent again": retried, "differences": differences(sound, folder)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--restart", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/failing"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    home, many = given.folder.resolve(), given.iterations
    tiny.build_pipeline(home / "pipeline")
    tiny.write_prompts(home / "prompts.jsonl")
    sound = train(home, "sound", many, SELF, {})
    used = importlib.import_module("benchmarks.trainer.failing_rewards").Reward  # not __main__'s
    used.calls = used.failed = 0
    inside = train(home, "inside", many, SELF, {"share": given.share})
    rows = [{
        **row("in process", sound, inside), "calls": used.calls, "of which failed": used.failed,
    }]  # fmt: skip
    options = {"batch": 2, "in_flight": 2, "backoff": 0.05, "retries": 40}
    with serving(SELF) as (url, _):
        sound = train(home, "http-sound", many, "http", {**options, "url": url})
    with ExitStack() as stack:
        one, _ = stack.enter_context(serving(SELF, "--option", f"share={given.share}"))
        two = stack.enter_context(Restarted(given.share, given.restart))
        behind = train(home, "http", many, "http", {**options, "url": [one, two.url]})
    rows.append({**row("two servers", sound, behind), "one of them killed": two.kills})
    for found in rows:
        print(json.dumps(found))
    if given.json:
        about = {"iterations": many, "share of calls that fail": given.share}
        given.json.write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n")
    return 1 if any(found["differences"] for found in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
