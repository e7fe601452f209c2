"""What a run holds in memory on one rank, by ZeRO stage: arithmetic on plain numbers.

DeepSpeed 0.19.8, found by counting the bytes of live tensors between micro-batches, on one rank and
on two; `tests/doctor/test_doctor.py` repeats what a CPU can. Per trained element, with b bytes a
weight, a bytes an accumulated gradient, W ranks, B the bucket's elements per trained element:

             weights  gradients                          optimiser       bucket      during the step
    0, fp32  b        a                                  8               -           temporaries
    0, half  b        a                                  12              -           4 + temporaries
    1        b        a                                  12 / W          a B         12 / W
    1, bf16  b        a + b (the last backward's stay)   12 / W          -           8 / W
    2        b        a / W                              12 / W          2 b B       12 / W
    3        b / W    a / W                              12 / W          b B, kept   12 / W

"1, bf16" is bf16 accumulating in fp32 without offload, where DeepSpeed takes another optimiser
class. The optimiser's 12 bytes are fp32 weights and Adam's two moments; stage 0 in fp32 steps the
weights themselves. In stage 2 the bucket and the copy it is reduced in are transient, and where
gradients accumulate in the weights' dtype a parameter on the border of two shares is kept whole by
both (not counted: at most one). Frozen weights (LoRA) cost b, at stage 3 b / W.

Offloading the optimiser moves its 12 bytes to the host and adds there 4 / W for gradients, b / W
for a copy of the weights (stages 1, 2) and a / W for accumulation, except that stage 2 in half
precision accumulates on the device. Stage 3 gathers layers as they run and keeps `zero.live` of
their elements, or gathers all weights for a whole rollout; a network is shared out as it is
loaded, one parameter after the other, and so is its frozen copy, if a reference is kept. With a
prompt cache the text encoders are gone before that.

Left out: what the forwards of reward models take, the CUDA context (0.5 to 1 GB), the libraries'
workspaces and the allocator's fragmentation; `HEADROOM` stands for the last three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from sfgrpo import zero

Dtype = Literal["fp32", "bf16", "fp16"]
BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
HEADROOM = 0.08
"""Share of a device that is left free before a run is said to fit."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Element counts of the network."""

    elements: int
    trained: int
    largest: int
    """Elements of the largest trained parameter."""
    widest: int = 0
    """Elements of the largest parameter, trained or not."""
    extra: int = 0
    """Bytes beyond those of `elements` in the run's dtype: buffers, and what is kept in fp32."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How it is trained."""

    stage: int = 0
    world: int = 1
    dtype: Dtype = "fp32"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = zero.BUCKET
    """Elements of a reduce bucket."""
    accumulate: Dtype = "fp32"
    """Dtype in which gradients accumulate over micro-batches."""
    reference: bool = False
    """Whether a frozen copy of the network is kept (full weights with a KL)."""
    ema: bool = False
    gathers: bool = False
    """At stage 3: whether sampling gathers all weights once, not layer by layer."""
    foreach: bool = True
    """Whether Adam steps all tensors at once (PyTorch's choice on GPUs) or one after another."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run holds beyond the states, in bytes, the same for every stage; see `footprint`."""

    others: int = 0
    """Autoencoder, and text encoders that stay on the device."""
    encoders: int = 0
    """Text encoders, wherever they are."""
    embedding: int = 0
    """Peak of embedding prompts, with the text encoders where they are on the device for that
    alone."""
    embeds_alone: bool = False
    """Whether prompts are embedded before anything else is loaded (a prompt cache)."""
    waiting: int = 0
    """Text encoders that wait in main memory between uses."""
    rewards: int = 0
    """Networks of rewards on the device, which are loaded first."""
    rewards_host: int = 0
    """The same in main memory."""
    rewards_passing: int = 0
    """The largest of those that pass main memory on their way to the device."""
    rollout: int = 0
    """Latents, states and text embeddings of an iteration, kept until its end."""
    sampling: int = 0
    """Peak above all that while sampling, without gradients."""
    decoding: int = 0
    """Peak of decoding one batch of latents."""
    backward: int = 0
    """Peak of activations in one micro-batch."""
    offloaded: int = 0
    """Activations of it that wait in main memory."""

    @property
    def decoder(self) -> int:
        """The autoencoder."""
        resident = not (self.embeds_alone or self.waiting)
        return self.others - (self.encoders if resident else 0)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of the training states on one rank, between two micro-batches."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    bucket: int = 0
    reference: int = 0
    ema: int = 0
    host: int = 0
    """Of offloaded states, in the CPU's memory; not in the sum."""

    @property
    def device(self) -> int:
        """The sum of what lies on the device."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.host


def whole(network: Network, setting: Setting) -> int:
    """Bytes of a network that is not shared out."""
    return BYTES[setting.dtype] * network.elements + network.extra


def share(elements: int, world: int) -> int:
    """Elements of one rank's part: DeepSpeed pads to equal parts of whole 4-byte words."""
    return -(-elements // (2 * world)) * 2


def held(network: Network, setting: Setting) -> Held:
    """What lies in memory between the micro-batches of an optimiser step, except the first step's
    (before it there are no moments)."""
    s, n = setting, network.trained
    b, a = BYTES[s.dtype], BYTES[s.accumulate]
    part = share(n, s.world) if s.stage else n
    frozen = b * (network.elements - n)
    states = 12 if s.stage or s.dtype != "fp32" else 8
    result = Held(
        weights=b * (part * s.world if s.stage else n) + frozen + network.extra,
        gradients=(b if s.stage == 0 else a) * n,
        optimizer=states * part,
        reference=whole(network, s) if s.reference else 0,
        ema=4 * part if s.ema else 0,
    )
    if s.stage == 1 and _bf16_optimizer(s):
        result = replace(result, gradients=a * part * s.world + b * n)
    elif s.stage == 1:
        result = replace(result, bucket=a * s.bucket)
    elif s.stage == 2:
        result = replace(result, gradients=a * part)
    elif s.stage == 3:
        result = replace(
            result,
            weights=b * (part + share(network.elements - n, s.world)) + network.extra,
            gradients=a * part,
            bucket=b * s.bucket,
            reference=b * share(network.elements, s.world) if s.reference else 0,
        )
    return _offloaded(result, network, s, part) if s.stage else result


def _bf16_optimizer(s: Setting) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer at stage 1."""
    return s.dtype == "bf16" and s.accumulate == "fp32" and not s.offload_optimizer


def _offloaded(state: Held, network: Network, s: Setting, part: int) -> Held:
    """The same with what is offloaded on the host."""
    b, a, host = BYTES[s.dtype], BYTES[s.accumulate], 0
    if s.offload_optimizer:
        # The averaged weights are a share of what the optimiser steps, so they lie beside it.
        host += state.optimizer + state.ema + 4 * part
        state = replace(state, optimizer=0, ema=0)
        if s.stage < 3:
            host += b * (part + network.largest)
            state = replace(state, bucket=state.bucket + b * network.largest)
        if s.stage == 3 or (s.stage == 2 and a == b):
            host += a * part
            state = replace(state, gradients=0)
    if s.stage == 3 and s.offload_parameters:
        host += state.weights + state.reference
        state = replace(state, weights=0, reference=0)
    return replace(state, host=host)


def phases(network: Network, setting: Setting, work: Work) -> dict[str, int]:
    """Bytes on the device at the worst moment of each phase of an iteration."""
    s, state = setting, held(network, setting)
    b = BYTES[s.dtype]
    everything = whole(network, s)
    gathered = b * zero.live(network.elements) if s.stage == 3 else 0
    gathers = s.stage == 3 and s.gathers
    loaded = everything * (2 if s.reference else 1)
    if s.stage == 3:
        loaded = state.weights + state.reference + b * network.widest
    between = state.device + work.others + work.rollout
    idle = between - state.gradients - (state.bucket if s.stage < 3 else 0)
    found = {
        "embedding": work.embedding + (0 if work.embeds_alone else idle),
        "loading": loaded + work.others,
        "sampling": idle + (everything if gathers else gathered) + work.sampling,
        "decoding": idle + (everything if gathers else 0) + work.decoding,
        "backward": between + gathered + work.backward + _reduction(network, s),
        "step": (between if _bf16_optimizer(s) or s.stage in (0, 3) else idle) + _step(network, s),
    }
    return {name: needed + work.rewards for name, needed in found.items()}


def _reduction(network: Network, s: Setting) -> int:
    """Transient bytes while gradients are reduced, beside the last of them."""
    b = BYTES[s.dtype]
    filled = b * min(s.bucket, network.trained)
    if s.stage == 2:
        # The next micro-batch's share lies beside the sum unless it is added piece by piece.
        incoming = b * share(network.trained, s.world) if s.accumulate == s.dtype else 0
        return b * s.bucket + max(filled, incoming)
    return filled if s.world > 1 else 0


def _step(network: Network, s: Setting) -> int:
    """Transient bytes of the optimiser's step on the device."""
    if s.offload_optimizer:
        return 0
    if s.stage:
        part = share(network.trained, s.world)
        return (8 if s.stage == 1 and _bf16_optimizer(s) else 12) * part
    gradients = 4 * network.trained if s.dtype != "fp32" else 0
    return gradients + (4 * network.trained if s.foreach else 12 * network.largest)


def total(network: Network, setting: Setting, work: Work) -> tuple[int, str]:
    """(bytes on the device at the worst moment, the phase it falls in)."""
    return worst(phases(network, setting, work))


def worst(found: Mapping[str, int]) -> tuple[int, str]:
    """(the most bytes, the phase they are of)."""
    name = max(found, key=lambda name: found[name])
    return found[name], name


def fits(needed: int, available: int) -> bool:
    """Whether a device with `available` bytes has room, `HEADROOM` left free."""
    return needed <= available * (1 - HEADROOM)
