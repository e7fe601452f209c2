"""What a node's main memory has to hold, by phase: arithmetic on plain numbers.

    rewards     their networks, one after the other on its way to the device
    loading     text encoders, decoder and network lie there before they are moved: the network of
                every rank, at stage 3 that of rank 0 alone, and what is kept there of a frozen copy
    embedding   with a prompt cache, text encoders alone, before that
    training    offloaded states and activations, text encoders between uses, rewards that score on
                the CPU, and all of it where there is no GPU
    saving      beside that, of rank 0, the averaged weights in fp32 and the exported ones, while
                shares that lie in main memory are set aside; or every rank's fp32 share on its way
                from a GPU to a file

Weights count as read in the run's dtype: where the files have the same one, their pages are the
files', shared and given up when memory is short. The node is taken to have rank 0. Left out: the
page cache, what CUDA and its libraries take, the samples that rewards are given. Buffers are not
pinned: DeepSpeed pins none unless told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sfgrpo.doctor import memory
from sfgrpo.doctor.memory import BYTES, Network, Setting, Work

PROCESS = 400 * 2**20
"""Anonymous memory of a rank that has imported everything and loaded nothing, without CUDA."""
FILE = 10 * 10**9
"""Bytes of weights that diffusers writes to one file, and fetches from a GPU for it."""


def phases(
    network: Network, setting: Setting, work: Work, ranks: int, *, device: int | None = None
) -> dict[str, int]:
    """Bytes of a node of `ranks` ranks at the worst moment of each phase.

    `device`, where there is no GPU: what a rank holds that would be the GPU's.
    """
    s, whole = setting, memory.whole(network, setting)
    least = PROCESS + work.rewards_host
    every = least + memory.held(network, s).host + work.waiting + work.offloaded + (device or 0)
    early = 0 if work.embeds_alone else work.encoders
    beside = least + work.decoder + early + _copied(network, s, here=device is not None)
    found = {
        "loading": ranks * beside + (whole if s.stage == 3 else ranks * whole),
        "training": ranks * every,
        "saving": ranks * every + _saved(network, s, ranks, here=device is not None),
    }
    if work.embeds_alone:
        found["embedding"] = ranks * (least + work.encoders)
    if work.rewards_passing:
        found["rewards"] = ranks * (least + work.rewards_passing)
    return found


def _copied(network: Network, s: Setting, *, here: bool) -> int:
    """Bytes of a rank's frozen copy that lie in main memory."""
    if not s.reference or not (here or s.offload_parameters):
        return 0
    if s.stage == 3:
        return BYTES[s.dtype] * memory.share(network.elements, s.world)
    return memory.whole(network, s)


def _saved(network: Network, s: Setting, ranks: int, *, here: bool) -> int:
    """Bytes of all ranks that a checkpoint takes while it is written; `here` without GPUs."""
    b, lora = BYTES[s.dtype], network.trained < network.elements
    part = 4 * (memory.share(network.trained, s.world) if s.stage else network.trained)
    whole = b * network.elements
    # Adapters are written by two libraries, the second time at full strength.
    exported = 2 * b * network.trained if lora else whole if s.stage == 3 else min(whole, FILE)
    aside = ranks * part if s.ema and (here or s.offload_optimizer) else 0
    averages = 4 * network.trained if s.ema else 0
    return max(averages + exported + aside, ranks * part)


def ways_out(setting: Setting, work: Work) -> Iterator[tuple[str, Setting, Work]]:
    """What takes less main memory, as a recipe says it, and what the estimate is of then."""
    alone = replace(work, embeds_alone=True, waiting=0, others=work.decoder)
    shared = replace(setting, stage=3)
    if not work.embeds_alone:
        yield "model.prompt_cache", setting, alone
    if setting.stage < 3:
        yield "deepspeed.zero_stage 3", shared, work
        if not work.embeds_alone:
            yield "deepspeed.zero_stage 3 and model.prompt_cache", shared, alone
    if setting.ema:
        yield "train.ema_decay 0", replace(setting, ema=False), work
    if setting.offload_optimizer or setting.offload_parameters:
        kept = replace(setting, offload_optimizer=False, offload_parameters=False)
        yield "nothing offloaded (deepspeed), if a device has room", kept, work
