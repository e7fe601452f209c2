"""The optimiser's state of other ranks, or of another ZeRO stage, shared anew while it is read.

DeepSpeed 0.19.8 loads the file that this very rank wrote, or nothing. At stages 1 to 3 such a file
holds a rank's share, flat: the elements that it steps (their fp32 masters) and what Adam averages
of each. Which elements those are follows from the trained parameters, in DeepSpeed's order, and the
number of ranks:

    stages 1, 2  all parameters one after the other, in equal parts: one a rank, the last padded
    stage 3      of every parameter an equal part, padded; these one after the other, in several
                 tensors where a rank has more than 1e9 elements

so that every layout can be read out of every other. The files are mapped into memory: a rank reads
the ranges that it needs and holds its own share, as it does when DeepSpeed loads it.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys
from torch import Tensor

from sfgrpo.engine.stored import Files

ALIGNED = 2
"""At stages 1 and 2 a rank's part has a multiple of so many elements."""
MASTERS = "fp32"
"""Stands for the masters among the names of Adam's averages."""
COMMON = (keys.LOSS_SCALER, "dynamic_loss_scale", "overflow")
"""What every rank writes alike, beside numbers of the recipe."""


@dataclass(frozen=True)
class Span:
    """Consecutive elements of a parameter in a rank's share."""

    name: str
    begin: int
    """The first of them in the flattened parameter."""
    length: int
    group: int
    """The flat tensor that holds them,"""
    place: int
    """and where in it they begin."""


@dataclass(frozen=True)
class Layout:
    """Who holds what."""

    stage: int
    """Of ZeRO, 1 to 3."""
    world: int
    """Ranks."""
    groups: Sequence[Mapping[str, int]]
    """For each flat tensor of a share the parameters in it, in their order: name -> elements."""

    @property
    def sizes(self) -> list[int]:
        """Elements of each flat tensor of a share, with padding."""
        if self.stage == 3:
            return [sum(map(self._part, group.values())) for group in self.groups]
        return [ALIGNED * -(-sum(g.values()) // (ALIGNED * self.world)) for g in self.groups]

    def spans(self, rank: int) -> Iterator[Span]:
        """What a rank holds."""
        for number, (group, size) in enumerate(zip(self.groups, self.sizes, strict=True)):
            start = 0  # of the parameter: in the share at stage 3, else in all shares together
            for name, count in group.items():
                part = self._part(count) if self.stage == 3 else size
                first = rank * part - (0 if self.stage == 3 else start)
                begin, end = max(first, 0), min(first + part, count)
                if begin < end:
                    place = start if self.stage == 3 else begin - first
                    yield Span(name, begin, end - begin, number, place)
                start += part if self.stage == 3 else count

    def _part(self, count: int) -> int:
        """A rank's part of a parameter, with padding, at stage 3."""
        return -(-count // self.world)


class Saved:
    """What the ranks of a checkpoint wrote; their files are opened when they are needed."""

    def __init__(self, folder: Path, files: Files, *, stage: int, world: int) -> None:
        """`folder` holds DeepSpeed's files, written at `stage` (1 to 3) by `world` ranks.

        Raises:
            pickle.UnpicklingError: the file of the weights is not there, or is not what DeepSpeed
                writes.
        """
        self.folder, self.files = folder, files
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        self.network = self._open(f"{prefix}mp_rank_00_model_states.pt", keys.PARAM_SHAPES)
        """Buffers, counts of steps and, short of stage 3, the weights the network computes with."""
        shapes = self.network[keys.PARAM_SHAPES]
        groups = [{name: shape.numel() for name, shape in group.items()} for group in shapes]
        self.layout = Layout(stage, world, groups)
        self._shares: dict[int, _Share] = {}
        self._holders: dict[str, list[tuple[int, Span]]] = defaultdict(list)
        for rank in range(world):
            for span in self.layout.spans(rank):
                self._holders[span.name].append((rank, span))

    def state(self, new: dict[str, Any], layout: Layout, rank: int) -> dict[str, Any]:
        """The optimiser's state that DeepSpeed would have written on `rank` of `layout`.

        `new` is that of its fresh optimiser there, which gives the form and the recipe's numbers.

        Raises:
            pickle.UnpicklingError: a file is not there, is not what DeepSpeed writes, or belongs to
                another network.
        """
        if (here := _elements(layout)) != (there := _elements(self.layout)):
            name = next(iter(dict(here.items() ^ there.items())))
            raise pickle.UnpicklingError(
                f"'{self.folder}' is of another network: the parameter {name} has "
                f"{there.get(name, 0)} elements there and {here.get(name, 0)} here"
            )
        made, first = _Share(dict(new), layout.stage), self._share(0)
        made.check(layout, rank, "DeepSpeed's new optimiser")
        made.held.update({k: first.held[k] for k in COMMON if k in first.held and k in new})
        flats = {kind: self._gathered(kind, layout, rank) for kind in first.kinds}
        made.held[made.masters] = flats.pop(MASTERS)
        averages = {
            # Each with a count of steps of its own: Adam adds to it in place.
            number: _copied(first.counts) | {kind: flat[number] for kind, flat in flats.items()}
            for number in range(len(layout.groups) if first.averages else 0)
        }
        made.held[made.optimizer] = {**made.held[made.optimizer], "state": averages}
        return made.held

    def _gathered(self, kind: str, layout: Layout, rank: int) -> list[Tensor]:
        """The flat tensors of a new share, on the CPU."""
        flats = [torch.zeros(size) for size in layout.sizes]
        for wanted in layout.spans(rank):
            for holder, there in self._holders[wanted.name]:
                begin = max(wanted.begin, there.begin)
                count = min(wanted.begin + wanted.length, there.begin + there.length) - begin
                if count > 0:
                    source = self._share(holder).flat(kind, there.group)
                    values = source.narrow(0, there.place + begin - there.begin, count)
                    place = wanted.place + begin - wanted.begin
                    flats[wanted.group].narrow(0, place, count).copy_(values)
        return flats

    def _share(self, rank: int) -> _Share:
        if rank not in self._shares:
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            name = name if (self.folder / name).exists() else f"bf16_{name}"
            held = self._open(name, keys.OPTIMIZER_STATE_DICT)
            self._shares[rank] = _Share(held[keys.OPTIMIZER_STATE_DICT], self.layout.stage)
            self._shares[rank].check(self.layout, rank, f"'{self.folder / name}'")
        return self._shares[rank]

    def _open(self, name: str, wanted: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            raise pickle.UnpicklingError(f"'{path}' is not there")
        held = self.files.load(str(path), map_location="cpu", mapped=True)
        if not isinstance(held, dict) or not held.get(wanted):
            raise pickle.UnpicklingError(f"'{path}' has no {wanted}: DeepSpeed did not write it")
        return held


class _Share:
    """The state of one rank's optimiser, as DeepSpeed writes and reads it."""

    def __init__(self, held: dict[str, Any], stage: int) -> None:
        self.held = held
        self.masters = keys.SINGLE_PARTITION_OF_FP32_GROUPS
        self.optimizer = keys.BASE_OPTIMIZER_STATE
        if stage == 3:
            self.masters, self.optimizer = keys.FP32_FLAT_GROUPS, keys.OPTIMIZER_STATE_DICT

    @property
    def averages(self) -> Mapping[int, Mapping[str, Any]]:
        """What Adam keeps of each flat tensor; nothing before the first step."""
        return self.held[self.optimizer]["state"]

    @property
    def counts(self) -> dict[str, Any]:
        """What it keeps once for all elements: the number of steps."""
        kept = next(iter(self.averages.values()), {})
        return {name: value for name, value in kept.items() if name not in self.kinds}

    @property
    def kinds(self) -> list[str]:
        """What there is of every element."""
        kept = next(iter(self.averages.values()), {})
        return [MASTERS, *(n for n, v in kept.items() if isinstance(v, Tensor) and v.dim())]

    def flat(self, kind: str, group: int) -> Tensor:
        """A flat tensor; at stages 1 and 2 the masters may come without their padding."""
        return self.held[self.masters][group] if kind == MASTERS else self.averages[group][kind]

    def check(self, layout: Layout, rank: int, name: str) -> None:
        """UnpicklingError unless this is the share of `rank` in `layout`."""
        expected: list[dict[str, tuple[int, int]]] = [{} for _ in layout.groups]
        for span in layout.spans(rank):
            expected[span.group][span.name] = (span.place, span.length)
        try:
            told = [
                {n: (address.start, address.numel) for n, address in group.items()}
                for group in self.held.get(keys.PARAM_SLICE_MAPPINGS, ())
            ]
            paddings = self.held.get(keys.GROUP_PADDINGS, [0] * len(layout.groups))
            fits = told in ([], expected) and all(
                size - (paddings[group] if kind == MASTERS else 0)
                <= self.flat(kind, group).numel() <= size
                for kind in self.kinds
                for group, size in enumerate(layout.sizes)
            )  # fmt: skip
        except (KeyError, IndexError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise pickle.UnpicklingError(
                f"{name} is not what DeepSpeed 0.19.8 keeps on rank {rank} of {layout.world} at "
                f"ZeRO stage {layout.stage}: somebody has changed it, or another version wrote it"
            )


def _elements(layout: Layout) -> dict[str, int]:
    return {name: count for group in layout.groups for name, count in group.items()}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
