"""Entry point of a training run.

    sfgrpo train RECIPE [--key value ...]                 one process
    deepspeed --module sfgrpo.train RECIPE [--key ...]    several, on one machine or many

Both run the same code.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo import extras
from sfgrpo.arguments import apart

if TYPE_CHECKING:  # they import PyTorch, which --help and a wrong recipe can do without
    from sfgrpo.config import Recipe
    from sfgrpo.run.stopping import Signals

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a disk, a quota, or what the system lets a file have."""

EPILOG = """\
Any key of the recipe can be replaced on the command line, its value read as YAML:

    sfgrpo train embedded --train.learning_rate 1e-4 --credit.rule uniform --lora null

`sfgrpo show RECIPE` prints every key with its value. A run that was stopped continues from its
newest checkpoint when the same command is given again; --fresh starts over.
"""


def prepare_process() -> None:
    """What a command-line run sets before PyTorch and transformers are imported."""
    # "module:function" in a recipe means a file of the folder where the command is given, as it
    # does for `python -m`. Last in the path: nothing there may hide a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # Waiting OpenMP threads sleep instead of spinning on a core that another thread may need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of a training run, without the recipe's own keys."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune a flow-matching generator with stepwise credit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("recipe", help="name of a recipe (see `sfgrpo recipes`) or a .yaml file")
    result.add_argument("--fresh", action="store_true", help="discard an earlier run in the folder")
    # The deepspeed launcher passes it; the rank itself is read from the environment.
    result.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return result


@extras.told
def main(argv: Sequence[str] | None = None, *, prog: str = "sfgrpo.train") -> int:
    """Train; returns the exit status. What is wrong with the input is said in one paragraph."""
    options = parser(prog)
    try:
        given = apart(
            sys.argv[1:] if argv is None else argv, flags=["--fresh"], valued=["--local_rank"]
        )
        if not given.words and not {"-h", "--help"} & set(given.options):
            options.error("give a recipe: a .yaml file, or a name that `sfgrpo recipes` lists")
        arguments = options.parse_args([*given.options, *given.words[:1]])
        given.no_more_than_a_recipe()
        prepare_process()
        from sfgrpo import config  # not for --help: it takes pydantic

        recipe = config.load(arguments.recipe, given.pairs)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    from sfgrpo import engine
    from sfgrpo.credit import CreditError
    from sfgrpo.drift import Disagreement
    from sfgrpo.guard import NonFinite
    from sfgrpo.rewards import RewardError
    from sfgrpo.run import agreement, claim, output, stopping
    from sfgrpo.run.checkpoints import CheckpointError
    from sfgrpo.run.peers import Agreed, Watch
    from sfgrpo.run.records import RunError
    from sfgrpo.solvers import SolverError

    refused = RunError, CheckpointError, engine.LaunchError
    stopped = NonFinite, Disagreement, RewardError, CreditError, SolverError
    try:
        engine.start()
        together = Watch(
            rank=engine.rank(), world=engine.world(), largest=engine.largest,
            timeout=recipe.run.peer_timeout, folder=recipe.run.output_dir,
            interface=engine.interface(), told=(*refused, *stopped),
        )  # fmt: skip
        with output.lasting(), stopping.Signals() as signals:
            agreement.check(recipe, fresh=arguments.fresh)
            with claim.claimed(recipe.run.output_dir), together:
                status = _run(recipe, signals, fresh=arguments.fresh, prog=prog, end=together.fail)
    except refused as error:
        if engine.rank() == 0 or not isinstance(error, Agreed):
            print(f"{prog}: {extras.explained(error)}", file=sys.stderr)
        status = 2
    except stopped as error:
        if engine.rank() == 0 or not isinstance(error, Agreed):
            print(f"\n{prog}: {error}", file=sys.stderr)
        status = 1
    engine.stop()
    return status


def _run(
    recipe: Recipe, signals: Signals, *, fresh: bool, prog: str, end: Callable[[str], object]
) -> int:
    """Train the recipe; returns the exit status. `end` ends all ranks for a reason."""
    from sfgrpo import engine
    from sfgrpo.run import origin
    from sfgrpo.run.records import RunError
    from sfgrpo.run.stopping import Interrupted
    from sfgrpo.trainer import Trainer

    try:
        if not fresh:
            origin.check_continued(recipe)
        trainer = Trainer(recipe, fresh=fresh, end=end)
    except (ValueError, OSError) as error:  # OSError: a model or a file that is not there
        raise RunError(str(error)) from error
    try:
        trainer.train(signals)
    except Interrupted as stop:
        if engine.rank() == 0:
            print(
                f"\n{prog}: {stop} after {trainer.iteration} iterations, which are saved; the same "
                "command (without --fresh) continues",
                file=sys.stderr,
            )
        return stop.status
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"'{recipe.run.output_dir}' has no room for what the run writes ({error}); its "
            "checkpoints are whole: make room, and the same command (without --fresh) continues"
        ) from error
    if engine.rank() == 0:
        _report(trainer.progress.folder, prog)
    return 0


def _report(folder: Path, prog: str) -> None:
    """Write the report of a run that is over. Whatever goes wrong here, in matplotlib or on the
    disk, the run did not fail."""
    from sfgrpo import report

    try:
        print(report.write(folder))
    except Exception as error:
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        print(
            f"{prog}: the run is over and saved, but its report could not be written ({why}); "
            f"`sfgrpo report {shlex.quote(str(folder))}` writes it",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
