"""The `sfgrpo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfgrpo import __version__, extras, train
from sfgrpo.arguments import apart
from sfgrpo.compare import EXAMPLE
from sfgrpo.run import output
from sfgrpo.serving import command as serving

Pairs = list[tuple[str, str]]
RECIPE_COMMANDS = {
    "show": {},
    "doctor": {"flags": ["--json"], "valued": ["--world", "--device-memory", "--host-memory"]},
    "probe": {"flags": ["--json"], "valued": ["--prompts", "--checkpoint", "--out"]},
    "evaluate": {"flags": ["--json"], "valued": ["--checkpoint", "--out"]},
}
"""Commands that take any key of a recipe, and their own options."""
EPILOG = """\
examples:
  sfgrpo train embedded                          fine-tune the embedded model on this machine
  deepspeed --module sfgrpo.train my.yaml        the same on all GPUs of a node
  sfgrpo doctor embedded                         will it run here, and in how much memory
  sfgrpo probe embedded                          how good is its credit signal, at what cost
  sfgrpo serve-reward pickscore --port 8000      score for trainings in other environments
  sfgrpo report runs/embedded                    what happened, as one HTML file
  sfgrpo report runs/a runs/b                    the same of several, and a page that compares them
  sfgrpo evaluate runs/embedded --eval.num_steps 40   the trained policy, measured in another way
  sfgrpo compare grid.yaml                       train variants over seeds and compare them
  sfgrpo compare runs/a runs/b --out curves.png  evaluation curves of several runs, by credit rule
"""


PROBE = """\
It samples trajectories once, of the untrained policy or of a run's, takes the clean estimates of
their states by every built-in solver (and the recipe's), decodes and scores them, and prints

  agreement   correlation of a solver's advantages with those of the exact ODE, against its cost:
              below .5 most of what a step is credited with is the solver's own error; uniform
              credit, which needs no estimate, is measured by the same
  share       how much of the final reward's variance within groups each step explains; all add up
              to 1. Noise in a step that explains nothing costs and teaches nothing: see
              sample.window and sample.min_noise
  noise       how far scores of one and the same image are apart; a reward whose noise comes near
              its standard deviation within groups teaches little
  windows     the same for noise in a few steps alone (sample.window), early, midway and late: what
              the agreement is there, what is left to learn from, and what it costs

and writes probe.json and probe.png to --out. It takes a few minutes on the embedded model, memory
as an iteration of so many prompts, one process, and touches no run folder. With few prompts mind
the errors behind +-.

  sfgrpo probe embedded --prompts 16 --sample.eta 1.0 --credit.solver midpoint
  sfgrpo probe runs/embedded --checkpoint 30        a policy in training, by the same table
"""


EVALUATE = """\
Samples images of the checkpoint's (averaged) weights from the noise that the run's own evaluations
have, scores and judges them, and prints the numbers beside those that the run logged. Any key that
says how a policy is measured can be replaced:

  sfgrpo evaluate runs/embedded --eval.num_steps 40          more steps than in training
  sfgrpo evaluate runs/embedded --checkpoint start           the policy before training
  sfgrpo evaluate runs/sd35 --eval.prompts_from test.jsonl --reward '{pickscore: 1}'
  sfgrpo evaluate runs/sd35 --eval.resolution 1024 --sample.guidance_scale 4.5

Numbers go to eval.jsonl in --out, images beside it. The run is only read, so it may be going on.
Relative paths in its recipe are meant from where it was started: elsewhere they are refused.
Several processes share the images: torchrun --nproc_per_node 8 -m sfgrpo.cli evaluate RUN.
"""


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="sfgrpo",
        description="Reinforcement learning of flow-matching generators with stepwise credit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"sfgrpo {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a recipe (sfgrpo train --help)", add_help=False)
    commands.add_parser("recipes", help="list the recipes of this package")
    show = commands.add_parser("show", help="print a recipe with every key filled in")
    show.add_argument("recipe", help="name or .yaml file")
    doctor = commands.add_parser("doctor", help="check this machine, and a recipe's memory on it")
    doctor.add_argument("recipe", nargs="?", help="name or .yaml file, then any --key value")
    doctor.add_argument("--world", type=int, help="ranks to plan for (default: the GPUs here)")
    doctor.add_argument(
        "--device-memory", type=float, metavar="GIB",
        help="GiB of the GPU each rank would have (default: of those that are here)",
    )  # fmt: skip
    doctor.add_argument(
        "--host-memory", type=float, metavar="GIB",
        help="GiB of main memory that a node would have (default: this one's)",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="print it for machines")
    _add_probe(commands)
    serving.add_parser(commands)
    report = commands.add_parser("report", help="write report.html of a run, or of several")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="run",
        help="a run's folder; of several, runs.html beside them compares and links all",
    )  # fmt: skip
    _add_evaluate(commands)
    compare = commands.add_parser(
        "compare", help="train a grid of variants and seeds and compare them, or plot runs",
        epilog=f"a grid file:\n{EXAMPLE}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare.add_argument("runs", type=Path, nargs="+", help="one GRID.yaml, or run folders")
    compare.add_argument("--no-train", action="store_true", help="of a grid: what there is")
    compare.add_argument("--out", type=Path, help="of folders: picture to write (compare.png)")
    compare.add_argument("--metric", help="of folders: a name in eval.jsonl (reward)")
    pretrain = commands.add_parser(
        "pretrain", help="train an embedded model as it is shipped (CPU, seeded)"
    )
    pretrain.add_argument("out", type=Path, help="pipeline folder to write")
    pretrain.add_argument("--task", default="embedded", help="embedded (default), numbers")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument(
        "--vae-steps", type=int, help="batches for the autoencoder (the task's own)"
    )
    pretrain.add_argument("--steps", type=int, help="batches for the flow model (the task's own)")
    pretrain.add_argument("--threads", type=int, help="CPU threads")
    return result


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe", help="measure the credit signal of a recipe before a run",
        description="How good is the credit that a recipe would learn from, and what does it cost?",
        epilog=PROBE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    probe.add_argument("recipe", help="name, .yaml file or a run's folder, then any --key value")
    probe.add_argument(
        "--checkpoint", metavar="WHICH",
        help="of a run: an iteration, best, start, or newest, the default",
    )  # fmt: skip
    probe.add_argument("--prompts", type=int, default=8, help="how many groups (default: 8)")
    probe.add_argument("--out", type=Path, default=Path("probe"), help="folder (default: probe)")
    probe.add_argument("--json", action="store_true", help="print it for machines")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="measure a checkpoint again: more steps, other prompts or rewards",
        description="Measure the policy of a run's checkpoint again, in another way.",
        epilog=EVALUATE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    evaluate.add_argument("run", type=Path, help="the run's folder, then any --key value")
    evaluate.add_argument(
        "--checkpoint", default="newest", metavar="WHICH",
        help="an iteration, best, start (before training) or newest, the default",
    )  # fmt: skip
    evaluate.add_argument("--out", type=Path, help="folder (default: one in RUN/evaluations)")
    evaluate.add_argument("--json", action="store_true", help="print the numbers for machines")


@extras.told
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # its options are the recipe's keys
        return train.main(arguments[1:], prog="sfgrpo train")
    command = arguments[0] if arguments else ""
    try:
        pairs = []
        if command in RECIPE_COMMANDS:
            given = apart(arguments[1:], **RECIPE_COMMANDS[command])
            given.no_more_than_a_recipe()
            arguments, pairs = [command, *given.options, *given.words], given.pairs
        parsed = _parser().parse_args(arguments)
        train.prepare_process()
        with output.lasting():
            return COMMANDS[parsed.command](parsed, pairs)
    except (ValueError, OSError) as error:
        print(f"sfgrpo {command}: {error}", file=sys.stderr)
        return 2


def _recipes(_: argparse.Namespace, __: Pairs) -> int:
    from sfgrpo.config import recipe_names

    print("\n".join(recipe_names()))
    return 0


def _show(parsed: argparse.Namespace, pairs: Pairs) -> int:
    import yaml

    from sfgrpo import config

    recipe = config.load(parsed.recipe, pairs)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _doctor(parsed: argparse.Namespace, pairs: Pairs) -> int:
    from sfgrpo.doctor import examination as doctor

    return doctor.main(
        parsed.recipe, pairs, world=parsed.world, device_memory=parsed.device_memory,
        host_memory=parsed.host_memory, machines=parsed.json,
    )  # fmt: skip


def _probe(parsed: argparse.Namespace, pairs: Pairs) -> int:
    from sfgrpo import probe

    return probe.main(
        parsed.recipe, pairs, prompts=parsed.prompts, out=parsed.out, machines=parsed.json,
        checkpoint=parsed.checkpoint,
    )  # fmt: skip


def _evaluate(parsed: argparse.Namespace, pairs: Pairs) -> int:
    from sfgrpo import saved

    return saved.main(
        parsed.run, pairs, checkpoint=parsed.checkpoint, out=parsed.out, machines=parsed.json
    )


def _report(parsed: argparse.Namespace, _: Pairs) -> int:
    from sfgrpo import report

    several = len(parsed.runs) > 1
    print(report.write_several(parsed.runs) if several else report.write(parsed.runs[0]))
    return 0


def _compare(parsed: argparse.Namespace, _: Pairs) -> int:
    grids = [p for p in parsed.runs if p.suffix in {".yaml", ".yml"} and not p.is_dir()]
    if not grids:
        from sfgrpo.report import plots

        if parsed.no_train:
            raise ValueError("--no-train: folders are never trained")
        out, metric = parsed.out or Path("compare.png"), parsed.metric or "reward"
        print(plots.compare(parsed.runs, out, metric=metric))
        return 0
    if parsed.runs[1:]:
        raise ValueError(f"'{grids[0]}' is a grid; give it alone")
    if parsed.out or parsed.metric:
        raise ValueError("--out, --metric: a grid has the keys output_dir and metric")
    from sfgrpo.compare import command

    return command.main(grids[0], train=not parsed.no_train)


def _pretrain(parsed: argparse.Namespace, _: Pairs) -> int:
    from sfgrpo.embedded.pretrain import pretrain
    from sfgrpo.embedded.task import find

    given = {name: getattr(parsed, name) for name in ("seed", "vae_steps", "steps", "threads")}
    pretrain(
        parsed.out,
        task=find(parsed.task),
        **{name: value for name, value in given.items() if value is not None},
    )
    return 0


def _serve_reward(parsed: argparse.Namespace, _: Pairs) -> int:
    return serving.main(parsed)


COMMANDS = {
    "recipes": _recipes,
    "show": _show,
    "doctor": _doctor,
    "probe": _probe,
    "evaluate": _evaluate,
    "serve-reward": _serve_reward,
    "report": _report,
    "compare": _compare,
    "pretrain": _pretrain,
}


if __name__ == "__main__":
    sys.exit(main())
