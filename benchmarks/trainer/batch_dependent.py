"""The embedded recipe through velocities that depend on the batch's size, as a GPU's bf16 do:

    python -m benchmarks.trainer.batch_dependent --seeds 0 1 2 [--clean] [--train.beta 0.01 ...]

prints for each seed the held-out reward, and each step's drift beside its budget. `--clean` leaves
the velocities as they are, for comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from sfgrpo import config
from sfgrpo.run import records
from sfgrpo.trainer import Trainer
from tests.support import batch_dependent

FP16 = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer.batch_dependent", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument("--recipe", default="embedded", help="default: embedded")
    found.add_argument("--seeds", type=int, nargs="+", default=[0])
    found.add_argument(
        "--relative", type=float, default=batch_dependent.RELATIVE,
        help="size of the difference beside the velocity's (default: %(default)s)",
    )  # fmt: skip
    found.add_argument("--clean", action="store_true", help="velocities as they are")
    return found


def train(recipe: config.Recipe, relative: float) -> None:
    """One run; its report's numbers are in the run's folder."""
    # PyTorch computes fp16 on any CPU; DeepSpeed asks for a native one.
    with patch(FP16, lambda self: True):
        trainer = Trainer(recipe, fresh=True)
    if relative:
        batch_dependent.perturb(trainer.backbone, relative)
    trainer.train()


def told(folder: Path) -> str:
    """The rewards and the drift of a finished run."""
    rewards = ", ".join(
        f"{row['iteration']}: {row['reward']:.3f}" for row in records.read(folder / "eval.jsonl")
    )
    rows = records.read(folder / "metrics.jsonl")
    shares = [
        max(values) for values in zip(*(r["logp_drift_of_budget"] for r in rows), strict=True)
    ]
    drifts = [max(values) for values in zip(*(r["logp_drift_per_step"] for r in rows), strict=True)]
    found = [row["loss_scale"] for row in rows if "loss_scale" in row]  # of fp16 alone
    scales = f"; loss scale {min(found):.0f} to {max(found):.0f}" if found else ""
    return (
        f"held-out reward {rewards}{scales}\n  largest drift of each step "
        + " ".join(f"{d:.1e}" for d in drifts)
        + "\n  of its budget "
        + " ".join(f"{s:.3f}" for s in shares)
    )


def main() -> None:
    """Run the seeds one after the other."""
    options, rest = parser().parse_known_args()
    relative = 0.0 if options.clean else options.relative
    keys = [(rest[i].removeprefix("--"), rest[i + 1]) for i in range(0, len(rest), 2)]
    for seed in options.seeds:
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # TensorBoard still writes
            recipe = config.load(
                options.recipe,
                [
                    ("run.seed", str(seed)), ("run.output_dir", folder),
                    ("train.drift_budget", str(8 * batch_dependent.RELATIVE)), *keys,
                ],
            )  # fmt: skip
            train(recipe, relative)
            print(f"seed {seed}, velocities off by {relative}: {told(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
