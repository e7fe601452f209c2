"""Checkpoints of other ranks and of other ZeRO stages go on, element by element the same."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.checkpoint import constants as keys

from sfgrpo import engine
from sfgrpo.engine.resharding import Layout
from tests.support import ranks
from tests.support.engines import KINDS, built, held, step

pytestmark = pytest.mark.slow


class Move(NamedTuple):
    """From a stage to another, of the weights that are trained."""

    old: int
    new: int
    dtype: str
    weights: str
    sub_group_size: int = 10**9

    def __str__(self) -> str:
        return " ".join(map(str, self))

    def built(self, stage: int) -> engine.Engine:
        return built(stage, self.dtype, self.weights, sub_group_size=self.sub_group_size)


MOVES = [
    Move(1, 1, "fp32", "full"), Move(1, 1, "bf16", "part"), Move(2, 2, "fp16", "part"),
    Move(3, 3, "fp16", "full"),
    Move(3, 3, "bf16", "full", 30),  # the groups are not the same on one rank and on two
    Move(1, 3, "bf16", "full"), Move(3, 2, "fp32", "part"), Move(2, 1, "bf16", "full"),
]  # fmt: skip
Found = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Of each move what an engine holds, and the values after a further step."""


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    engine.start()
    yield
    engine.stop()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Found, Found, Path]]:
    """By the number of ranks that go on: what was saved by the others, 1 or 2, and what is held."""
    folder = tmp_path_factory.mktemp("moves")
    one = written(folder / "1")
    two, by_two = ranks.run("tests.engine.test_resharding:work", 2, folder)[0]
    return {1: (two, read(folder / "2", 2), folder / "2"), 2: (one, by_two, folder / "1")}


def work(folder: Path) -> tuple[Found, Found]:
    """On both of two ranks: save, and go on with what one saved."""
    engine.start()  # or DeepSpeed would compile an all-reduce of its own
    return written(folder / "2"), read(folder / "1", 1)


def written(folder: Path) -> Found:
    """Save an engine of each move after two steps."""
    found = {}
    for move in MOVES:
        trained, place = move.built(move.old), folder / str(move)
        for buffer in trained.network.module.buffers():
            buffer.fill_(0.5)
        for _ in range(2):
            step(trained, KINDS[move.dtype])
        place.mkdir(parents=True, exist_ok=True)
        trained.save(place)
        found[str(move)] = held(trained), step(trained, KINDS[move.dtype])
    return found


def read(folder: Path, world: int) -> Found:
    """Go on with each of them, which so many ranks saved."""
    found = {}
    for move in MOVES:
        trained = move.built(move.new)
        trained.load_anew(folder / str(move), stage=move.old, world=world)
        found[str(move)] = held(trained), step(trained, KINDS[move.dtype])
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_other_ranks_hold_what_was_saved(
    moved: dict[int, tuple[Found, Found, Path]], move: Move, world: int
) -> None:
    (saved, after), (found, next_step) = (side[str(move)] for side in moved[world][:2])
    assert found.keys() == saved.keys()
    assert found["steps"] == saved["steps"] != {0.0}
    assert found["scaler"] == saved["scaler"]
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].reshape(-1), value.reshape(-1)), name
            assert value.any(), name
    torch.testing.assert_close(next_step, after)
    assert not all(torch.equal(next_step[name], saved[name]) for name in after)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_together_hold_every_element_once(stage: int, world: int) -> None:
    groups = [{"a": 35, "b": 1}, {"c": 12, "d": 7, "e": 300}]
    layout, counts = Layout(stage, world, groups), {n: c for g in groups for n, c in g.items()}
    found = {name: torch.zeros(count) for name, count in counts.items()}
    for rank in range(world):
        shares = [torch.zeros(size) for size in layout.sizes]
        for span in layout.spans(rank):
            assert span.name in groups[span.group]
            found[span.name][span.begin : span.begin + span.length] += 1
            shares[span.group].narrow(0, span.place, span.length).add_(1)
        assert all(share.max() <= 1 for share in shares)
    assert all(torch.equal(value, torch.ones_like(value)) for value in found.values())


def without(key: str, file: Path) -> None:
    held = torch.load(file, weights_only=False)
    del held[keys.OPTIMIZER_STATE_DICT][key]
    torch.save(held, file)


OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
DAMAGE = {
    "rank_1_mp_rank_00_optim_states.pt' is not there": lambda f: (f / OPTIMIZER.format(1)).unlink(),
    "rank_0.*' is not what DeepSpeed 0.19.8 keeps on rank 0 of 2 at ZeRO stage 1": (
        lambda f: shutil.copy(f / OPTIMIZER.format(1), f / OPTIMIZER.format(0))
    ),
    "rank_1.*' is not what": (
        lambda f: without(keys.SINGLE_PARTITION_OF_FP32_GROUPS, f / OPTIMIZER.format(1))
    ),
    "model_states.pt' has no param_shapes": (
        lambda f: torch.save({}, f / "mp_rank_00_model_states.pt")
    ),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_file_that_is_not_of_the_checkpoint_is_named(
    moved: dict[int, tuple[Found, Found, Path]], tmp_path: Path, problem: str
) -> None:
    move = MOVES[0]
    shutil.copytree(moved[1][2] / str(move), tmp_path / "it")
    DAMAGE[problem](tmp_path / "it" / "engine")
    trained = built(1, "fp32", "full")
    before = trained.masters.whole()
    with pytest.raises(pickle.UnpicklingError, match=problem):
        trained.load_anew(tmp_path / "it", stage=1, world=2)
    assert all(torch.equal(value, before[name]) for name, value in trained.masters.whole().items())


def test_another_network_is_named(moved: dict[int, tuple[Found, Found, Path]]) -> None:
    expected = r"parameter 0\.(weight|bias) has \d+ elements there and 0 here"
    with pytest.raises(pickle.UnpicklingError, match=expected):
        built(1, "fp32", "part").load_anew(moved[1][2] / str(MOVES[0]), stage=1, world=2)
