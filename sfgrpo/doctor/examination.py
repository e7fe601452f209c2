"""`sfgrpo doctor [RECIPE]`: will it run here, on what, and in how much memory?

Without a recipe: environment, devices, backends of the ops with a self-check, processes. With one:
what a rank will hold in memory at each ZeRO stage, found without loading a weight (`footprint`,
`memory`), and whether that fits; what an iteration takes (`twins`), and settings that are known to
disappoint (`advice`). Exit status 1 if something prevents training.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sfgrpo import zero
from sfgrpo.config import Recipe, load
from sfgrpo.doctor import machine, memory, rewards, selfcheck
from sfgrpo.doctor.machine import GIB, Facts, Problem
from sfgrpo.doctor.memory import Network, Setting, Work
from sfgrpo.doctor.text import as_text, called, size
from sfgrpo.doctor.twins import Cost, compare

VARIANTS = (
    (0, False, False), (1, False, False), (2, False, False), (3, False, False),
    (1, True, False), (2, True, False), (3, True, False), (3, False, True), (3, True, True),
)  # fmt: skip
"""(stage, optimiser offloaded, parameters offloaded)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The estimate of one variant, in bytes per rank."""

    setting: Setting
    held: memory.Held
    peak: int
    phase: str
    """What is going on at the peak."""
    checkpointed: int
    """The peak with gradient checkpointing."""
    phase_checkpointed: str
    """What is going on at that peak."""
    fits: bool
    fits_checkpointed: bool
    chosen: bool
    """Whether the recipe asks for this variant."""


@dataclass(kw_only=True)
class Report:
    """Everything found."""

    sections: dict[str, Facts] = field(default_factory=dict)
    ops: dict[str, list[selfcheck.Checked]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    memory: list[Row] = field(default_factory=list)
    cost: Cost | None = None
    """Of a recipe that is known to run."""

    def add(self, title: str, found: tuple[Facts, list[Problem]]) -> None:
        self.sections[title] = found[0]
        self.problems += found[1]

    @property
    def healthy(self) -> bool:
        return not any(problem.fatal for problem in self.problems)


def examine(
    recipe: Recipe | None, world: int | None, *, device_memory: int | None = None
) -> Report:
    """Collect the report.

    `world` is the number of ranks to plan for (default: the devices'), `device_memory` the bytes of
    the device each of them would have (default: of those that are here).
    """
    report = Report()
    report.add("Environment", machine.environment())
    report.add("Devices", machine.devices())
    _check_ops(report)
    report.add("Processes", machine.distributed())
    if recipe is not None:
        launched = os.environ.get("WORLD_SIZE", "")
        ranks = world or (int(launched) if launched.isdecimal() else 0)
        report.problems += rewards.problems(recipe)
        _estimate(report, recipe, ranks or max(torch.cuda.device_count(), 1), device_memory)
    return report


def _check_ops(report: Report) -> None:
    report.sections["Devices"]["C++ ops"] = selfcheck.cpp_library()
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for name in ("cpu", *accelerators):
        report.ops[name] = selfcheck.check(torch.device(name))
        wrong = [item for item in report.ops[name] if not item.good]
        if wrong:
            told = next((item.failure for item in wrong if item.failure), "results differ")
            what = f"{name}: {', '.join(item.op for item in wrong)}: {told}"
            remedy = "please report it with the output of `sfgrpo doctor --json`"
            report.problems.append(Problem(what=what, remedy=remedy, fatal=True))
        if name == "cpu" and any(item.backend == "reference" for item in report.ops[name]):
            what = "plain PyTorch serves the ops on the CPU, 10 to 50 times slower than C++"
            remedy = "install a C++17 compiler (Debian: apt install g++)"
            report.problems.append(Problem(what=what, remedy=remedy))


def setting(recipe: Recipe, network: Network, world: int, room: int | None = None) -> Setting:
    """What a recipe asks for, in the estimator's numbers; `room` is the bytes of a rank's GPU, None
    for ranks that share main memory."""
    asked: dict[str, Any] = recipe.deepspeed.model_dump()
    return Setting(
        stage=zero.stage(recipe),
        world=world,
        dtype=recipe.model.dtype,
        offload_optimizer=asked.get("offload_optimizer") == "cpu",
        offload_parameters=asked.get("offload_parameters") == "cpu",
        bucket=zero.bucket(network.trained, network.largest),
        reference=recipe.lora is None and recipe.train.beta > 0,
        ema=recipe.train.ema_decay > 0,
        gathers=_gathers(recipe, network, room),
        foreach=room is not None,
    )


def _gathers(recipe: Recipe, network: Network, room: int | None) -> bool:
    """Whether sampling gathers all weights once: the engine, too, looks for room beside a whole
    network."""
    whole = memory.BYTES[recipe.model.dtype] * network.elements
    free = None if room is None else room - whole
    return zero.gathers_once(recipe.deepspeed.gather_for_sampling, whole, free)


def rows(
    network: Network, plain: Work, checkpointed: Work, asked: Setting, room: int | None = None
) -> list[Row]:
    """The estimates of all variants, for GPUs with `room` bytes, or main memory."""
    found = []
    for stage, optimizer, parameters in VARIANTS:
        if stage == 0 and asked.dtype != "fp32":
            continue
        variant = replace(
            asked, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters
        )
        peak, phase = memory.total(network, variant, plain)
        saved, phase_saved = memory.total(network, variant, checkpointed)
        host = memory.held(network, variant).host
        found.append(
            Row(
                setting=variant, held=memory.held(network, variant), peak=peak, phase=phase,
                checkpointed=saved, phase_checkpointed=phase_saved,
                fits=_fits(peak, host, asked.world, room),
                fits_checkpointed=_fits(saved, host, asked.world, room), chosen=variant == asked,
            )
        )  # fmt: skip
    return found


def _fits(device: int, host: int, world: int, room: int | None) -> bool:
    """Whether every rank finds room: on a GPU of `room` bytes, or all of them in the main memory of
    this machine. What is offloaded goes there, too, for as many ranks as it has GPUs."""
    if room is None:
        return memory.fits((device + host) * world, machine.memory())
    here = min(world, torch.cuda.device_count())
    return memory.fits(device, room) and memory.fits(host * here, machine.memory())


def _smallest_gpu() -> int | None:
    """Bytes of the GPU that has fewest, None without one."""
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min((gpu.total_memory for gpu in gpus), default=None)


def _estimate(report: Report, recipe: Recipe, world: int, device_memory: int | None) -> None:
    """Add the memory, disk space, cost and problems of a recipe."""
    from sfgrpo import generator
    from sfgrpo.doctor import advice, footprint
    from sfgrpo.doctor.skeleton import NoPipeline, skeleton
    from sfgrpo.policy import check_start

    try:
        generator.prompts_of(recipe)
        check_start(recipe.lora)
        network, (plain, checkpointed) = footprint.measure(recipe, world)
        backbone = skeleton(recipe)
        shape = backbone.latent_shape(*recipe.model.size)
        sigmas = backbone.sigmas(recipe.sample.num_steps, shape)
        report.cost = compare(recipe, sigmas, world, footprint.flops(recipe, backbone))
        report.problems += advice.notes(recipe, sigmas)
    except NoPipeline as error:
        remedy = "start a short run (--run.iterations 1) and watch its memory"
        report.problems.append(Problem(what=str(error), remedy=remedy))
        return
    except (ValueError, OSError) as error:
        remedy = "correct the recipe; for a model of the Hub, see that it can be downloaded"
        report.problems.append(Problem(what=str(error), remedy=remedy, fatal=True))
        return
    room = device_memory or _smallest_gpu()
    asked = setting(recipe, network, world, room)
    report.memory = rows(network, plain, checkpointed, asked, room)
    report.sections["Recipe"] = _facts(recipe, network, plain, checkpointed, world)
    # Averages, weights and their export (adapters: diffusers' and peft's), the optimiser's state.
    weights = (3 if recipe.lora else 2) * memory.BYTES[asked.dtype]
    trained = (4 + weights + (16 if asked.stage else 8)) * network.trained
    report.add("Disk", machine.disk(recipe.run.output_dir, trained * (recipe.checkpoint.keep + 1)))
    _judge(report, bool(recipe.train.model_dump().get("gradient_checkpointing")))


def _facts(recipe: Recipe, network: Network, plain: Work, checkpointed: Work, world: int) -> Facts:
    weights = f"LoRA of rank {recipe.lora.rank}" if recipe.lora else "all weights"
    model, (height, width, frames) = recipe.model, recipe.model.size
    shape = f"{height} x {width} pixels" + (f", {frames} frames" if frames > 1 else "")
    stay = {"resident": "on the device", "offload": "on the device while they embed"}
    where = "gone before the rest is loaded" if plain.embeds_alone else stay[model.text_encoders]
    decoder = plain.others - (plain.encoders if where == stay["resident"] else 0)
    return {
        "model": f"{model.path}, {model.dtype}, {shape}",
        "parameters": f"{network.elements:,}, {network.trained:,} of them trained ({weights})",
        "ranks": str(world),
        "text encoders": f"{size(plain.encoders)}, {where}",
        "decoder": size(decoder),
        "kept of an iteration": size(plain.rollout),
        "sampling, decoding": f"{size(plain.sampling)}, {size(plain.decoding)} at their peaks",
        "activations": f"{size(plain.backward)} for one micro-batch, "
        f"{size(checkpointed.backward)} with gradient checkpointing",
    }


def _judge(report: Report, checkpointing: bool) -> None:
    """A problem if what the recipe asks for does not fit, with the first thing that would."""
    chosen = next((row for row in report.memory if row.chosen), None)
    if chosen is None or (chosen.fits_checkpointed if checkpointing else chosen.fits):
        return
    plain, saved = (
        (chosen.peak, chosen.phase),
        (chosen.checkpointed, chosen.phase_checkpointed),
    )
    needed, phase = saved if checkpointing else plain
    remedies = [
        f"{called(row.setting)}{'' if row.fits else ' with train.gradient_checkpointing'}"
        for row in [chosen, *report.memory]
        if row.fits or row.fits_checkpointed
    ]
    none = "nothing fits as it is: smaller train.micro_batch_size or sample.batch_size, LoRA, bf16"
    remedy = f"this would fit: {remedies[0]}" if remedies else none
    what = f"a rank needs {size(needed)} while in phase '{phase}', more than there is"
    report.problems.append(Problem(what=what, remedy=remedy, fatal=True))


def as_json(report: Report) -> str:
    """The report for machines."""
    tree = {name.lower(): facts for name, facts in report.sections.items()}
    ops = {name: [asdict(item) for item in found] for name, found in report.ops.items()}
    found = {"ops": ops, "memory": [asdict(row) for row in report.memory]}
    found["cost"] = report.cost.as_tree() if report.cost else None
    problems = [asdict(problem) for problem in report.problems]
    return json.dumps({**tree, **found, "problems": problems, "healthy": report.healthy}, indent=2)


def main(
    recipe: str | None,
    overrides: Sequence[tuple[str, str]],
    *,
    world: int | None,
    device_memory: float | None,
    machines: bool,
) -> int:
    """Print the report; returns the exit status. `device_memory` is in GiB.

    Raises:
        ValueError: a number that cannot be, or keys without a recipe; the recipe is wrong.
    """
    if world is not None and world < 1:
        raise ValueError(f"--world: ranks to plan for must be at least 1, got {world}")
    if device_memory is not None and not 0 < device_memory < math.inf:
        raise ValueError(f"--device-memory: must be GiB above 0, got {device_memory}")
    if overrides and recipe is None:
        raise ValueError(f"--{overrides[0][0]}: a key needs its recipe, and none is given")
    room = round(device_memory * GIB) if device_memory else None
    report = examine(load(recipe, overrides) if recipe else None, world, device_memory=room)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(as_json(report) if machines else as_text(report, colour=colour))
    return 0 if report.healthy else 1
