"""Known counters whose normals are zero: there a backend shows how it negates.

Where a word turns into an angle of whole quarter turns, the sine or cosine is 0, and where the
other turns into u = 1, the radius is -0. About one pair of normals in ten million is of either
kind; these were found by search (seed 0, step 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 256
"""Of a row; all zeros are among them."""

ZEROS = {
    # (sample id, element): sign bit
    (6375, 236): True,  # a quarter turn: cos
    (1597253, 7): True,  # half a turn: sin
    (1462076, 70): False,  # three quarters: cos
    (1060684, 31): False,  # a whole turn: sin
    # No radius, in each quarter turn: cos, sin.
    (602029, 120): True,
    (602029, 121): True,
    (1104780, 160): False,
    (1104780, 161): True,
    (998029, 140): False,
    (998029, 141): True,
    (1861365, 232): False,
    (1861365, 233): False,
    (1471445, 132): True,
    (1471445, 133): False,
}

SAMPLES = torch.tensor(sorted({sample for sample, _ in ZEROS}))


def wrong_zeros(normals: Tensor) -> list[tuple[int, int]]:
    """The (sample id, element) whose normal in `[len(SAMPLES), ELEMENTS]` is not the known zero."""
    row = {sample: index for index, sample in enumerate(SAMPLES.tolist())}
    wrong = []
    for (sample, element), negative in ZEROS.items():
        normal = normals[row[sample], element].cpu()
        if normal != 0 or bool(torch.signbit(normal)) != negative:
            wrong.append((sample, element))
    return wrong
