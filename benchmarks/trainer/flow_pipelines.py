"""Every flow-matching pipeline of the installed diffusers, and what becomes of it here.

python -m benchmarks.trainer.flow_pipelines > benchmarks/results/flow_pipelines.md

The pipelines are read from diffusers' source, which imports nothing of it; the verdicts are in
flow_pipelines.yaml beside this file. A pipeline without one is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml

CLASS = re.compile(r"^class (?=\w+\()", re.M)
SCHEDULER = re.compile(r"^        scheduler: ([^=\n]+?),?(?: = .*)?$", re.M)
FLOW = re.compile(r"Flow|Piflow|UniPC|RFScheduler|Helios")
"""What the names of schedulers contain that step along a flow, or along one in a mode of theirs:
the models published with a UniPC here were all trained by flow matching."""
HEADINGS = {
    "served": "Served",
    "could": "Could be served, not yet",
    "condition": "Want a condition that is not text, or make what they make from another sample",
    "cannot": "Cannot be served by what there is",
}


def folder() -> Path:
    """Where diffusers is installed."""
    spec = find_spec("diffusers")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def classes() -> Iterator[tuple[str, str]]:
    """(name, what its constructor says of its scheduler) of every pipeline; "" for no scheduler."""
    for path in sorted((folder() / "pipelines").glob("*/*.py")):
        for part in CLASS.split(path.read_text(encoding="utf-8"))[1:]:
            name, bases = part.split("(", 1)[0], part.split(")", 1)[0]
            if "Pipeline" in bases.removeprefix(name):
                scheduler = SCHEDULER.search(part.split("super().__init__", 1)[0])
                yield name, scheduler[1] if scheduler else ""


def flows() -> dict[str, str]:
    """Scheduler by pipeline, of those whose scheduler steps along a flow."""
    return {name: scheduler for name, scheduler in classes() if FLOW.search(scheduler)}


def verdicts() -> dict[str, tuple[str, str]]:
    """(kind, why or which backbone) by pipeline; a pipeline may have but one."""
    kinds = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, str]] = {}
    for kind, groups in kinds.items():
        for group in groups:
            reason = group["backbone" if kind == "served" else "why"]
            for name in group["pipelines"]:
                if name in found:
                    raise ValueError(f"{name} has two verdicts: {found[name][1]!r}, {reason!r}")
                found[name] = kind, reason
    return found


def table() -> str:
    """The whole file of results."""
    found, annotated = verdicts(), dict(classes())
    missing, gone = flows().keys() - found.keys(), found.keys() - annotated.keys()
    if missing or gone:
        raise ValueError(f"without a verdict: {sorted(missing)}; not in diffusers: {sorted(gone)}")
    lines = [
        "# Flow-matching pipelines of diffusers",
        "",
        "Written by `python -m benchmarks.trainer.flow_pipelines` from the source of diffusers and",
        "the verdicts in `benchmarks/trainer/flow_pipelines.yaml`. In the list is every pipeline",
        "whose constructor names a scheduler of a flow, and those that name another one and were",
        "trained by flow matching all the same.",
        "",
        "Every pipeline has `enable_attention_slicing`; it does nothing for those that are served:",
        "none of their networks has a `set_attention_slice`, and their attention, fused or linear,",
        "holds no matrix of the sequence's square. What saves memory is in the recipe: gradient",
        "checkpointing, offloaded activations, `model.context_parallel`, slices and tiles of the",
        "decoder.",
    ]
    for kind, heading in HEADINGS.items():
        rows = [(name, reason) for name, (k, reason) in found.items() if k == kind]
        lines += [
            "",
            f"## {heading} ({len(rows)})",
            "",
            "| pipeline | scheduler | |",
            "|---|---|---|",
        ]
        what = "by `{}`" if kind == "served" else "{}"
        lines += [
            f"| {name} | {annotated[name].replace('|', 'or')} | {what.format(reason)} |"
            for name, reason in rows
        ]
    return "\n".join((*lines, "", *modular()))


def modular() -> list[str]:
    """A last line about models that have modular pipelines alone."""
    names = [
        {p.name for p in (folder() / place).iterdir() if (p / "__init__.py").is_file()}
        for place in ("modular_pipelines", "pipelines")
    ]
    alone = ", ".join(sorted(names[0] - names[1]))
    return [f"Not in the list, since they have modular pipelines alone: {alone}."]


if __name__ == "__main__":
    print(table())
