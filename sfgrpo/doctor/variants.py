"""A recipe's memory as it asks for it, and at other ZeRO stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sfgrpo import zero
from sfgrpo.config import Recipe
from sfgrpo.doctor import host, memory
from sfgrpo.doctor.memory import Network, Setting, Work

VARIANTS = (
    (0, False, False), (1, False, False), (2, False, False), (3, False, False),
    (1, True, False), (2, True, False), (3, True, False), (3, False, True), (3, True, True),
)  # fmt: skip
"""(stage, optimiser offloaded, parameters offloaded)."""

RELIEF = {
    "embedding": "model.text_encoders: offload, or a model.prompt_cache",
    "loading": "bf16, or deepspeed.zero_stage 3",
    "sampling": "a smaller sample.batch_size",
    "decoding": "a smaller model.decode_batch, model.vae_tiling, or fewer pixels (evaluated, too)",
    "backward": "a smaller train.micro_batch_size, train.gradient_checkpointing, LoRA, or bf16",
    "step": "LoRA, bf16, or deepspeed.offload_optimizer: cpu",
}
"""Phase -> what it takes less memory by."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is for a run, in bytes."""

    device: int | None = None
    """Of the GPU of each rank; None for ranks that compute in main memory."""
    host: int | None = None
    """Of the main memory of a node; None if nothing is known of it."""
    ranks: int = 1
    """How many share that."""

    def on_device(self, peak: int) -> bool:
        """Whether a rank's bytes find room on its GPU, if it has one."""
        return self.device is None or memory.fits(peak, self.device)

    def on_node(self, bytes_: int) -> bool:
        """Whether a node's bytes find room in its main memory, if that is known."""
        return self.host is None or memory.fits(bytes_, self.host)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one variant needs at its worst moments, in bytes, and what is going on then."""

    peak: int
    """Of a rank, on its device."""
    phase: str
    node: int
    """Of a node, in main memory."""
    node_phase: str

    @classmethod
    def of(cls, network: Network, setting: Setting, work: Work, room: Room) -> Estimate:
        peak, phase = memory.total(network, setting, work)
        device = peak if room.device is None else None
        found = host.phases(network, setting, work, room.ranks, device=device)
        node, node_phase = memory.worst(found)
        return cls(peak=peak, phase=phase, node=node, node_phase=node_phase)

    def fits(self, room: Room) -> bool:
        return room.on_device(self.peak) and room.on_node(self.node)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The estimates of one variant, in bytes per rank, and of a node's main memory."""

    setting: Setting
    held: memory.Held
    peak: int
    phase: str
    """What is going on at the peak."""
    checkpointed: int
    """The peak with gradient checkpointing."""
    phase_checkpointed: str
    """What is going on at that peak."""
    node: int
    """The most that a node's main memory holds, without gradient checkpointing."""
    node_phase: str
    fits: bool
    fits_checkpointed: bool
    chosen: bool
    """Whether the recipe asks for this variant."""


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
    network: Network, plain: Work, checkpointed: Work, asked: Setting, room: Room
) -> list[Row]:
    """The estimates of all variants."""
    found = []
    for stage, optimizer, parameters in VARIANTS:
        if stage == 0 and asked.dtype != "fp32":
            continue
        variant = replace(
            asked, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters
        )
        one, two = (Estimate.of(network, variant, w, room) for w in (plain, checkpointed))
        found.append(
            Row(
                setting=variant, held=memory.held(network, variant), peak=one.peak, phase=one.phase,
                checkpointed=two.peak, phase_checkpointed=two.phase, node=one.node,
                node_phase=one.node_phase, fits=one.fits(room), fits_checkpointed=two.fits(room),
                chosen=variant == asked,
            )
        )  # fmt: skip
    return found


def ways_out(network: Network, work: Work, asked: Setting, room: Room) -> list[str]:
    """What else a recipe could say to find room in a node's main memory."""
    return [
        words
        for words, setting, other in host.ways_out(asked, work)
        if Estimate.of(network, setting, other, room).fits(room)
    ]
