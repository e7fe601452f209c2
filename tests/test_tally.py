"""Rows that went through the network are counted, all of them and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfgrpo.tally import Tally
from tests.support.rollouts import SHAPE, field, finished, forward_rows, run


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("spare", [0, 2])
def test_every_row_of_the_network_counts(guidance: float, spare: int) -> None:
    """Also those of forwards that a rank makes for others to go on."""
    velocity = replace(
        field(bend=0.4, guidance=guidance, batch_size=5), pace=lambda count: count + spare
    )
    finished(velocity, run(velocity))
    assert velocity.tally == Tally(velocity=sum(forward_rows(velocity)))


def test_rows_with_gradient_are_counted_apart() -> None:
    """A field for another network, as the reference's is, counts into the same record."""
    velocity = field()
    x, t, prompt = torch.zeros(3, *SHAPE), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    replace(velocity, guidance=2.0)(x, t, prompt)
    with torch.no_grad():
        velocity(x[:2], t[:2], prompt[:2])
    assert velocity.tally == Tally(velocity=2, gradient=3)
    assert field().tally == Tally()
