"""What the recipes of published models need: python -m benchmarks.trainer.footprints.

Writes `results/memory_published.md`. Nothing is loaded and nothing runs: the numbers are those of
`sfgrpo doctor RECIPE --world 8`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sfgrpo import backbones, config
from sfgrpo.config import Recipe
from sfgrpo.doctor import examination as doctor
from sfgrpo.doctor import footprint, memory
from sfgrpo.doctor.machine import GIB
from sfgrpo.doctor.memory import Network, Work

RESULT = Path(__file__).parents[1] / "results" / "memory_published.md"
RANKS = 8
VARIANTS = {
    (1, False, False): "ZeRO 1",
    (2, False, False): "ZeRO 2",
    (3, False, False): "ZeRO 3",
    (3, True, True): "ZeRO 3, all offloaded",
}
"""(stage, optimiser offloaded, parameters offloaded); half precision has no stage 0."""
MODELS = (
    "recipe", "parameters", "trained", "text encoders, GiB", "size", "sampling, GiB",
    "decoding, GiB", "rows", "backward, GiB", "checkpointing, GiB",
)  # fmt: skip
TEXT = """\
# What the recipes of published models need

Written by `python -m benchmarks.trainer.footprints`: estimates of `sfgrpo doctor RECIPE --world 8`,
from the models' configurations, with their networks on the meta device. None of these runs has been
measured on a GPU. Left out are the reward's own models (PickScore's 3.7 GiB), the CUDA context,
workspaces of kernels and fragmentation; `footprint.py` and `memory.py` in `sfgrpo/doctor/` say what
is counted. A recipe's micro-batch has `rows` rows; sampling, decoding and backward are their peaks
above what is held.

"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def facts(name: str, recipe: Recipe, network: Network, works: Sequence[Work]) -> list[str]:
    """A row of the first table: what the model is, and the peaks above what is held."""
    height, width, frames = recipe.model.size
    plain, checkpointed = works
    return [
        name, f"{network.elements:,}", f"{network.trained:,}", _gib(plain.encoders),
        f"{height} x {width}" + (f" x {frames}" if frames > 1 else ""),
        *map(_gib, (plain.sampling, plain.decoding)), str(recipe.train.micro_batch_size),
        *map(_gib, (plain.backward, checkpointed.backward)),
    ]  # fmt: skip


def stages(recipe: Recipe, network: Network, work: Work, *, chosen: bool) -> list[str]:
    """Of each variant: the states held, the peak, and its phase; the recipe's own is bold."""
    asked, cells = doctor.setting(recipe, network, RANKS), []
    for stage, optimizer, parameters in VARIANTS:
        variant = replace(
            asked, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters
        )
        peak, phase = memory.total(network, variant, work)
        cell = f"{_gib(memory.held(network, variant).device)}, {_gib(peak)} {phase}"
        cells.append(f"**{cell}**" if chosen and variant == asked else cell)
    return cells


def main() -> int:
    """Write the tables."""
    models, variants, layered = [], [], []
    for name in config.recipe_names():
        recipe = config.load(name)
        if recipe.model.path in backbones.EMBEDDED:
            continue
        network, works = footprint.measure(recipe, RANKS)
        models.append(facts(name, recipe, network, works))
        chosen = recipe.train.gradient_checkpointing
        if recipe.deepspeed.gather_for_sampling == "layer":
            layered.append(name)
        for checkpointing in (True,) if chosen else (False, True):
            label = f"{name}, {'with' if checkpointing else 'without'}"
            cells = stages(recipe, network, works[checkpointing], chosen=checkpointing == chosen)
            variants.append([label, *cells])
        print(name, file=sys.stderr)
    lines = [
        *_table(MODELS, models),
        "GiB per rank on 8 ranks: training states held, then the peak of everything and what is",
        "going on at it. Bold: as the recipe is. Below ZeRO 3 every rank holds all weights. At",
        "ZeRO 3 it holds its share from the start, and gathers all of them for rollouts unless the",
        f"recipe says `gather_for_sampling: layer` ({', '.join(layered)}).",
        "",
        *_table(("recipe, gradient checkpointing", *VARIANTS.values()), variants),
    ]
    RESULT.write_text(TEXT + "\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
