"""Stands for `python -m sfgrpo.train RECIPE.yaml` where a whole run is too slow.

Like it, it keeps the folder's lock, appends to its logs, saves each second iteration, goes on from
there when it is started again, and saves when it is asked to stop. Iterations take PACE seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from sfgrpo.run import lock, records

PACE = float(os.environ.get("PACE", "0.02"))


def main(path: Path) -> int:
    recipe = json.loads(path.read_text())
    folder, last = Path(recipe["run"]["output_dir"]), recipe["run"]["iterations"]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    with ExitStack() as held:
        if problem := lock.take(folder / lock.NAME, "", held, key="run.output_dir"):
            print(problem)
            return 2
        (folder / "recipe.yaml").write_text(path.read_text())
        done = records.newest(folder) or 0
        for name in ("metrics", "eval"):
            log = folder / f"{name}.jsonl"
            kept = [row for row in records.read(log) if row["iteration"] <= done]
            log.write_text("".join(json.dumps(row) + "\n" for row in kept))
        print(f"from {done} with {os.environ['OMP_NUM_THREADS']} threads")
        while done < last and not asked:
            time.sleep(PACE)
            done += 1
            row = {"iteration": done, "reward": done / last}
            if recipe["credit"]["rule"] == "uniform" and recipe["run"]["seed"] == 13:
                print("an iteration\rof bad luck")
                return 1
            for name in ("metrics", *(["eval"] if done == last else [])):
                with (folder / f"{name}.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if done % 2 == 0 or done == last or asked:
                (folder / "checkpoints" / f"{done:06d}").mkdir(parents=True, exist_ok=True)
        if asked:
            (folder / "checkpoints" / f"{done:06d}").mkdir(parents=True, exist_ok=True)
    return 128 + asked[0] if asked else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
