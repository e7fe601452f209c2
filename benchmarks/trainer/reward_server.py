"""Many clients at one reward server: is anything lost, duplicated or reordered, and how fast is it?

    python -m benchmarks.trainer.reward_server --json benchmarks/results/reward_server_cpu.json

Starts `sfgrpo serve-reward` with a reward that costs nothing and reads from each image which one it
is. Clients in threads of this process, each the reward `http` with a connection of its own, send
their shares of the images at once; every score must be the number of its image, and the server must
have scored as many images as there are. Client and server share this machine's cores. Exits with 1
if anything is amiss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from sfgrpo import rewards

SIDE = 32
"""Pixels."""
BASE = 256
"""A number's digits are the colours of an image."""


def numbered(start: int, count: int) -> Tensor:
    """Images `[count, 3, SIDE, SIDE]` that say which they are, exactly also in eight bits."""
    numbers = torch.arange(start, start + count)
    digits = torch.stack([numbers // BASE**place % BASE for place in range(3)], 1)
    return (digits.float() / (BASE - 1))[..., None, None].repeat(1, 1, SIDE, SIDE)


def number() -> rewards.Reward:
    """The reward that reads it."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Tensor:
        digits = (images[:, :, 0, 0].double() * (BASE - 1)).round()
        return (digits * torch.tensor([float(BASE**place) for place in range(3)])).sum(1)

    return score


@contextmanager
def serving(*arguments: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of `sfgrpo serve-reward`."""
    command = [sys.executable, "-m", "sfgrpo.cli", "serve-reward", *arguments, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        while not (found := re.search(r"http://\S+:\d+", process.stdout.readline())):
            if process.poll() is not None:
                raise RuntimeError("the server ended")
        yield found[0], process
    finally:
        process.terminate()
        process.communicate()


def samples_scored(url: str) -> int:
    """What the server has counted."""
    text = httpx2.get(f"{url}/metrics").text
    found = re.search(r"samples_total\S* (\d+)", text)
    return int(found[1]) if found else 0


def measure(url: str, images: int, clients: int, batch: int, form: str) -> dict[str, Any]:
    """Send all images once, and look at every score."""
    ends = [images * client // clients for client in range(clients + 1)]
    shares = list(itertools.pairwise(ends))
    made: Any = [
        rewards.build("http", url=url, batch=batch, in_flight=1, images=form) for _ in shares
    ]
    sent = [numbered(start, end - start) for start, end in shares]
    scores: list[Tensor] = [torch.empty(0)] * clients
    before, ready = samples_scored(url), threading.Barrier(clients + 1)

    def client(which: int) -> None:
        count = len(sent[which])
        ready.wait()
        scores[which] = made[which](sent[which], [""] * count, [{}] * count)

    threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    since = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - since
    return {
        "images": images, "clients": clients, "batch": batch, "form": form,
        "in order, each once": torch.equal(torch.cat(scores), torch.arange(float(images))),
        "scored by the server": samples_scored(url) - before,
        "sent again": sum(reward.retried for reward in made),
        "seconds": round(seconds, 2), "images per second": round(images / seconds),
        "requests per second": round(sum(-(-len(part) // batch) for part in sent) / seconds),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--form", nargs="+", default=["safetensors"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with serving("benchmarks.trainer.reward_server:number") as (url, _):
        rows = [
            measure(url, given.images, given.clients, batch, form)
            for form in given.form for batch in given.batch
        ]  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    if given.json:
        load = [round(value, 1) for value in os.getloadavg()]
        about = {"cores": os.cpu_count(), "load averages": load, "side of an image": SIDE}
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    well = [
        row["in order, each once"] and row["scored by the server"] == row["images"] for row in rows
    ]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
