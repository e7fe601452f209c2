"""Training is the same at every ZeRO stage, on any number of ranks (benchmarks.trainer.parity)."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.trainer import parity
from benchmarks.trainer.parity import LEARNING_RATE, Case, Outcome, difference, distance
from tests.support import ranks

# One fixture trains for all: on a busy machine longer than a single test may take.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STAGES = [Case(stage, weights) for weights in ("lora", "full") for stage in range(4)]
LAYERS = Case(
    3, options={"deepspeed.gather_for_sampling": "layer", "train.gradient_checkpointing": "true"}
)
OFFLOAD = Case(
    3, "lora", options={"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_parameters": "cpu"}
)
BF16 = Case(3, dtype="bf16")
FP16 = Case(0, dtype="fp16", options={"train.loss_scale": "1024"})
DYNAMIC = Case(2, dtype="fp16", options={"train.beta": "1e6"})
ALONE = Case(0, dtype="bf16")
RESUMED = {1: replace(ALONE, resumed=True), 2: Case(3, resumed=True)}
TAKEN = {1: Case(3, begun_by=2), 2: replace(ALONE, begun_by=1)}

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, Outcomes]:
    """Every run of this file by its number of ranks: one process serves all of a rank."""
    cases = {
        1: [*parity.plain("lora", "fp32"), *parity.plain("full", "fp32"),
            *(parity.plain("full", dtype)[0] for dtype in ("bf16", "fp16")),
            *STAGES, ALONE, RESUMED[1], TAKEN[1]],
        2: [*STAGES, LAYERS, OFFLOAD, BF16, FP16, DYNAMIC, RESUMED[2], TAKEN[2]],
    }  # fmt: skip
    return parity.run(cases)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", STAGES, ids=str)
def test_parameters_equal_those_of_plain_pytorch(
    outcomes: dict[int, Outcomes], case: Case, world: int
) -> None:
    check(outcomes, outcomes[world][str(case)], case)


@pytest.mark.parametrize("case", [LAYERS, OFFLOAD], ids=str)
def test_so_they_do_with_every_option(outcomes: dict[int, Outcomes], case: Case) -> None:
    check(outcomes, outcomes[2][str(case)], case)


def test_so_they_do_when_one_rank_goes_on_with_what_two_began(
    outcomes: dict[int, Outcomes],
) -> None:
    check(outcomes, outcomes[1][str(TAKEN[1])], TAKEN[1])


def check(outcomes: dict[int, Outcomes], outcome: Outcome, case: Case) -> None:
    """Within what plain PyTorch differs from itself when it adds in another order."""
    plain, reordered = (outcomes[1][str(c)] for c in parity.plain(case.weights, case.dtype))
    for name in ("parameters", "averages"):
        expected = getattr(plain, name)
        rounding = distance(getattr(reordered, name), expected)
        assert rounding < 0.01 * LEARNING_RATE
        assert distance(getattr(outcome, name), expected) <= 2 * rounding
    for one, two in zip(plain.metrics, outcome.metrics, strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("world", "case"), [(1, ALONE), (2, BF16), (2, FP16), (2, TAKEN[2])], ids=str
)
def test_half_precision_is_as_near_as_half_precision_is(
    outcomes: dict[int, Outcomes], world: int, case: Case
) -> None:
    """Two runs that round independently are sqrt(2) times as far from each other as each is from
    fp32; a step too many at the start would be four times that."""
    plain = outcomes[1][str(parity.plain("full", case.dtype)[0])]
    exact = outcomes[1][str(parity.plain("full", "fp32")[0])]
    budget = 1.5 * distance(plain.parameters, exact.parameters)
    assert distance(outcomes[world][str(case)].parameters, plain.parameters) <= budget


def test_overflow_is_skipped_and_the_scale_halved(outcomes: dict[int, Outcomes]) -> None:
    """DeepSpeed starts at 2^16 and forgives the first overflow (hysteresis 2)."""
    rows = outcomes[2][str(DYNAMIC)].metrics
    skipped = sum(row["skipped_steps"] for row in rows)
    assert skipped
    assert rows[-1]["loss_scale"] == 2.0 ** (16 - max(0, skipped - 1))


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_two_ranks_draw_the_same_trajectories(outcomes: dict[int, Outcomes], case: Case) -> None:
    """The noise is the same bit for bit; what the network adds depends on the shape of its batches
    in the last bits."""
    one, two = outcomes[1][str(case)], outcomes[2][str(case)]
    assert torch.equal(one.latents[0][:, 0], two.latents[0][:, 0])
    for ours, theirs in zip(one.latents, two.latents, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(one.advantages, two.advantages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for outcome in (one, two):
        assert [row["cost"] for row in outcome.metrics] == outcome.costs
    for mine, other in zip(one.metrics, two.metrics, strict=True):
        for name in mine.keys() - {"cost"}:  # a group that is split begins on both ranks
            if "drift" not in name:  # rounding itself
                assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    outcomes: dict[int, Outcomes], world: int
) -> None:
    cut = outcomes[world][str(RESUMED[world])]
    whole = outcomes[world][str(replace(RESUMED[world], resumed=False))]
    assert cut.metrics == whole.metrics
    assert difference(cut.parameters, whole.parameters) == 0
    assert difference(cut.averages, whole.averages) == 0


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_the_averaged_weights_are_exported_whole(outcomes: dict[int, Outcomes], case: Case) -> None:
    outcome = outcomes[2][str(case)]
    prefix = "transformer." if case.weights == "lora" else ""
    # Exported adapters carry their strength: B is written times alpha / rank, a power of two here.
    strength = parity.ALPHA / parity.RANK
    expected = {
        prefix + n.replace(".default.", "."): v * strength if "lora_B" in n else v
        for n, v in outcome.averages.items()
    }
    assert outcome.exported.keys() >= expected.keys()
    assert all(torch.equal(outcome.exported[name], value) for name, value in expected.items())


def test_one_gather_serves_a_rollout(outcomes: dict[int, Outcomes]) -> None:
    once, layers = (outcomes[2][str(case)] for case in (Case(3), LAYERS))
    elements = sum(value.numel() for value in once.parameters.values())
    assert 2 * elements <= once.gathered < 2.1 * elements  # two iterations; shards are padded
    assert layers.gathered > 3 * once.gathered  # four steps, each with a forward


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_rank_that_fails_ends_the_others_and_shows_why(seconds: float) -> None:
    with pytest.raises(ranks.RankError, match=r"rank 1 ended .*\n(.*\n)*.*ZeroDivisionError"):
        ranks.run("tests.engine.test_zero:fail_on_one", 2, seconds)


def fail_on_one(seconds: float) -> None:
    """Rank 1 leaves and fails `seconds` later: rank 0 misses it at once, and ends first."""
    if torch.distributed.get_rank() == 1:
        torch.distributed.destroy_process_group()
        time.sleep(seconds)
        raise ZeroDivisionError
    torch.distributed.barrier()
