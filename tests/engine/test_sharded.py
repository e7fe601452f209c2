"""A network that rank 0 alone reads, shared out over two ranks (stage 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.trainer import family_checks
from sfgrpo import config, engine
from sfgrpo.doctor.footprint import Ledger
from sfgrpo.embeddings import backbone_of
from sfgrpo.policy import Policy
from sfgrpo.prompts import Split
from tests.support import families, ranks

SIDE, LAYERS = 128, 8
NAMES = ("wan22", "sd3")
"""Two networks in one, with parts that diffusers keeps in fp32; a buffer that files hold."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By family, what `work` returns of both ranks, and the folder of its pipeline; "held" is of
    both ranks alone."""
    place = tmp_path_factory.mktemp("sharded")
    folders = [families.save(name, place / name) for name in NAMES]
    table = folders[1] / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(table)
    # The class makes this table by itself: only another tells whether the file's was taken.
    state["pos_embed.pos_embed"] += 1
    save_file(state, table, metadata={"format": "pt"})
    given = dict(zip(NAMES, folders, strict=True))
    both = ranks.run("tests.engine.test_sharded:work", 2, given)
    of_families = {name: [*(rank[name] for rank in both), given[name]] for name in NAMES}
    return {**of_families, "held": [rank["held"] for rank in both]}


def work(folders: dict[str, Path]) -> dict[str, Any]:
    """Of each pipeline: where this rank's weights were; the policy's and the frozen start's, whole.
    And the most bytes of live tensors while a network and its frozen copy are sharded."""
    results, device = {}, engine.start()
    for name, folder in folders.items():
        keys = {"lora": "null", "train__beta": "0.1", "model__dtype": "bf16"}
        keys["deepspeed"] = "{zero_stage: 3}"
        recipe = family_checks.recipe(name, folder, folder / "run", **keys)
        split = Split(train=families.FAMILIES[name].prompts(), evaluation=[])
        backbone, _ = backbone_of(recipe, device, split, sharded=True)
        network = backbone.transformer
        places = {p.device.type for p in network.parameters()}
        policy = Policy(network, recipe, backbone.lora_targets)
        with policy.reference() as start:
            whole = {"policy": _whole(policy.network), "start": _whole(start)}
        results[name] = {"places": places, **whole}
    return {**results, "held": _held(recipe)}


def _held(recipe: config.Recipe) -> int:
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)]
    network = nn.Sequential(*layers).to("meta" if engine.rank() else "cpu", torch.bfloat16)
    with Ledger() as ledger:
        start = engine.frozen(network, recipe)
        engine.shard(network, recipe)
    assert start is not network
    return ledger.peak


def _whole(network: Any) -> dict[str, Tensor]:
    """State of a sharded network, or of the engine around one."""
    network = getattr(network, "module", network)
    state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().clone()
    return state


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_its_share_of_what_the_first_reads(
    found: dict[str, list[Any]], name: str
) -> None:
    """The weights of files in the run's dtype, bit for bit, and the buffers."""
    *both, folder = found[name]
    assert [rank["places"] for rank in both] == [{"cpu"}, {"meta"}]
    network: nn.Module = family_checks.load(name, folder, dtype=torch.bfloat16).transformer
    expected = {n: p.detach().to(torch.bfloat16) for n, p in network.named_parameters()}
    expected |= dict(network.named_buffers())
    for state in (state for rank in both for state in (rank["policy"], rank["start"])):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype
            assert torch.equal(state[key], value), key


def test_no_rank_makes_a_network_whole(found: dict[str, list[Any]]) -> None:
    """Half of it, half of its frozen copy, and one layer that is on its way, whole and its half;
    while the copy is made, rank 0 has the whole that it read."""
    layer = 2 * SIDE * SIDE
    one, two = (most / layer for most in found["held"])
    assert LAYERS <= one <= LAYERS + LAYERS / 2 + 1.5
    assert LAYERS <= two <= LAYERS / 2 + LAYERS / 2 + 1.5
