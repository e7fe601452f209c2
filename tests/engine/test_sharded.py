"""A network that rank 0 alone reads, shared out over two ranks (stage 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.trainer import family_checks
from tests.support import families, ranks
from tests.support.sharded import LAYERS, SIDE

NAMES = ("wan22", "sd3")
"""Two networks in one, with parts that diffusers keeps in fp32; a buffer that files hold."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sharded")
    saved = {name: families.save(name, place / name) for name in NAMES}
    table = saved["sd3"] / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(table)
    # The class makes this table by itself: only another tells whether the file's was taken.
    state["pos_embed.pos_embed"] += 1
    save_file(state, table, metadata={"format": "pt"})
    return saved


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> list[Any]:
    """What `sharded.work` returns of both ranks."""
    keys = {
        "lora": "null", "train__beta": "0.1", "model__dtype": "bf16", "deepspeed": "{zero_stage: 3}"
    }  # fmt: skip
    recipes = {
        name: family_checks.recipe(name, folder, folder / "run", **keys)
        for name, folder in folders.items()
    }
    return ranks.run("tests.support.sharded:work", 2, recipes)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_its_share_of_what_the_first_reads(
    folders: dict[str, Path], found: list[Any], name: str
) -> None:
    """The weights of files in the run's dtype, bit for bit, and the buffers."""
    both = [rank[name] for rank in found]
    assert [rank["places"] for rank in both] == [{"cpu"}, {"meta"}]
    network: nn.Module = family_checks.load(name, folders[name], dtype=torch.bfloat16).transformer
    expected = {n: p.detach().to(torch.bfloat16) for n, p in network.named_parameters()}
    expected |= dict(network.named_buffers())
    for state in (state for rank in both for state in (rank["policy"], rank["start"])):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype
            assert torch.equal(state[key], value), key


def test_no_rank_makes_a_network_whole(found: list[Any]) -> None:
    """Half of it, half of its frozen copy, and one layer that is on its way, whole and its half;
    while the copy is made, rank 0 has the whole that it read. The layer before may still be there:
    a thread of gloo lets go of what it has sent after the sender was told that it is."""
    layer = 2 * SIDE * SIDE
    one, two = (rank["held"] / layer for rank in found)
    assert LAYERS <= one <= LAYERS + LAYERS / 2 + 2.5
    assert LAYERS <= two <= LAYERS / 2 + LAYERS / 2 + 2.5
