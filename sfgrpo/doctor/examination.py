"""`sfgrpo doctor [RECIPE]`: will it run here, on what, and in how much memory?

Without a recipe: environment, devices, backends of the ops with a self-check, processes. With one:
what a rank will hold in memory at each ZeRO stage, found without loading a weight (`footprint`,
`memory`), and what a node in its main memory (`host`), and whether that fits; what an iteration
takes (`twins`), and settings that are known to disappoint (`advice`). Exit status 1 if something
prevents training.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from sfgrpo.config import Recipe, load
from sfgrpo.doctor import host, machine, memory, rewards, selfcheck
from sfgrpo.doctor.machine import GIB, Facts, Problem
from sfgrpo.doctor.memory import Network, Setting, Work
from sfgrpo.doctor.text import as_text, called, size
from sfgrpo.doctor.twins import Cost, compare
from sfgrpo.doctor.variants import RELIEF, Estimate, Room, Row, rows, setting, ways_out

NODE = 8
"""Ranks that a node of GPUs that are not here is taken to have."""


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
    recipe: Recipe | None,
    world: int | None,
    *,
    device_memory: int | None = None,
    host_memory: int | None = None,
) -> Report:
    """Collect the report.

    `world` is the number of ranks to plan for (default: the devices'), `device_memory` the bytes of
    the device each of them would have (default: of those that are here), `host_memory` those of a
    node's main memory (default: of this machine's, unless the devices are others).
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
        _estimate(
            report, recipe, ranks or max(torch.cuda.device_count(), 1), device_memory, host_memory
        )
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


def _smallest_gpu() -> int | None:
    """Bytes of the GPU that has fewest, None without one."""
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min((gpu.total_memory for gpu in gpus), default=None)


def _room(world: int, device_memory: int | None, host_memory: int | None) -> Room:
    """What there is; of a machine that is not this one, what is said of it."""
    device = device_memory or _smallest_gpu()
    here = torch.cuda.device_count() if not device_memory else NODE
    launched = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(launched) if launched.isdecimal() else min(world, here) if device else world
    known = host_memory or (None if device_memory else machine.memory())
    return Room(device=device, host=known, ranks=ranks)


def _estimate(
    report: Report, recipe: Recipe, world: int, device_memory: int | None, host_memory: int | None
) -> None:
    """Add the memory, disk space, cost and problems of a recipe."""
    from sfgrpo import generator
    from sfgrpo.doctor import advice, footprint, sharing
    from sfgrpo.doctor.skeleton import NoPipeline, skeleton
    from sfgrpo.policy import check_start

    try:
        generator.prompts_of(recipe)
        check_start(recipe.lora)
        network, works = footprint.measure(recipe, world)
        backbone = skeleton(recipe)
        shape = backbone.latent_shape(*recipe.model.size)
        sigmas = backbone.sigmas(recipe.sample.num_steps, shape)
        groups = sharing.groups(recipe, backbone, world)
        report.cost = compare(recipe, sigmas, groups, footprint.flops(recipe, backbone))
        report.problems += advice.notes(recipe, sigmas)
    except NoPipeline as error:
        remedy = "start a short run (--run.iterations 1) and watch its memory"
        report.problems.append(Problem(what=str(error), remedy=remedy))
        return
    except (ValueError, OSError) as error:
        remedy = "correct the recipe; for a model of the Hub, see that it can be downloaded"
        report.problems.append(Problem(what=str(error), remedy=remedy, fatal=True))
        return
    scorers = rewards.taken(recipe)
    plain, checkpointed = (
        replace(
            work, rewards=scorers.device, rewards_host=scorers.host,
            rewards_passing=scorers.passing,
        )
        for work in works
    )  # fmt: skip
    room = _room(world, device_memory, host_memory)
    asked = setting(recipe, network, world, room.device)
    report.memory = rows(network, plain, checkpointed, asked, room)
    report.sections["Recipe"] = {
        **_facts(recipe, network, plain, checkpointed, world), "rewards": scorers.told(),
    }  # fmt: skip
    work = checkpointed if recipe.train.gradient_checkpointing else plain
    report.sections["Main memory of a node"] = _on_node(network, work, asked, room)
    # Averages, weights and their export (adapters: diffusers' and peft's), the optimiser's state.
    weights = (3 if recipe.lora else 2) * memory.BYTES[asked.dtype]
    trained = (4 + weights + (16 if asked.stage else 8)) * network.trained
    report.add("Disk", machine.disk(recipe.run.output_dir, trained * (recipe.checkpoint.keep + 1)))
    _judge(report, network, work, asked, room)


def _facts(recipe: Recipe, network: Network, plain: Work, checkpointed: Work, world: int) -> Facts:
    weights = f"LoRA of rank {recipe.lora.rank}" if recipe.lora else "all weights"
    model, (height, width, frames) = recipe.model, recipe.model.size
    shape = f"{height} x {width} pixels" + (f", {frames} frames" if frames > 1 else "")
    stay = {"resident": "on the device", "offload": "on the device while they embed"}
    where = "gone before the rest is loaded" if plain.embeds_alone else stay[model.text_encoders]
    return {
        "model": f"{model.path}, {model.dtype}, {shape}",
        "parameters": f"{network.elements:,}, {network.trained:,} of them trained ({weights})",
        "ranks": str(world)
        + f", of which {model.context_parallel} share each sequence" * (model.context_parallel > 1),
        "text encoders": f"{size(plain.encoders)}, {where}",
        "decoder": size(plain.decoder),
        "kept of an iteration": size(plain.rollout),
        "sampling, decoding": f"{size(plain.sampling)}, {size(plain.decoding)} at their peaks",
        "activations": f"{size(plain.backward)} for one micro-batch, "
        f"{size(checkpointed.backward)} with gradient checkpointing"
        + (f" and {size(checkpointed.offloaded)} in main memory" * bool(checkpointed.offloaded)),
    }


def _on_node(network: Network, work: Work, asked: Setting, room: Room) -> Facts:
    device = memory.total(network, asked, work)[0] if room.device is None else None
    found = host.phases(network, asked, work, room.ranks, device=device)
    there = size(room.host) if room.host else "not known: say --host-memory"
    return {
        "ranks": str(room.ranks), **{name: size(needed) for name, needed in found.items()},
        "there is": there,
    }  # fmt: skip


def _judge(report: Report, network: Network, work: Work, asked: Setting, room: Room) -> None:
    """A problem if what the recipe asks for does not fit, with the first thing that would."""
    found = Estimate.of(network, asked, work, room)
    if found.fits(room):
        return
    remedies = [
        f"{called(row.setting)}{'' if row.fits else ' with train.gradient_checkpointing'}"
        for row in sorted(report.memory, key=lambda row: not row.chosen)
        if row.fits or row.fits_checkpointed
    ]
    what = f"a rank needs {size(found.peak)} while in phase '{found.phase}', more than there is"
    none = f"no stage of ZeRO fits as it is; less of this phase: {RELIEF[found.phase]}"
    if room.device is not None and room.on_device(found.peak):
        remedies = ways_out(network, work, asked, room) + remedies
        what = (
            f"the {room.ranks} ranks of a node need {size(found.node)} of its main memory while in "
            f"phase '{found.node_phase}', more than there is"
        )
        none = "a node with more main memory, or fewer ranks on it"
    remedy = f"this would fit: {remedies[0]}" if remedies else none
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
    host_memory: float | None = None,
    machines: bool,
) -> int:
    """Print the report; returns the exit status. Memory is in GiB.

    Raises:
        ValueError: a number that cannot be, or keys without a recipe; the recipe is wrong.
    """
    if world is not None and world < 1:
        raise ValueError(f"--world: ranks to plan for must be at least 1, got {world}")
    rooms = {"--device-memory": device_memory, "--host-memory": host_memory}
    for name, given in rooms.items():
        if given is not None and not 0 < given < math.inf:
            raise ValueError(f"{name}: must be GiB above 0, got {given}")
    if overrides and recipe is None:
        raise ValueError(f"--{overrides[0][0]}: a key needs its recipe, and none is given")
    device, node = (round(given * GIB) if given else None for given in rooms.values())
    report = examine(
        load(recipe, overrides) if recipe else None, world, device_memory=device, host_memory=node
    )
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(as_json(report) if machines else as_text(report, colour=colour))
    return 0 if report.healthy else 1
