"""Many clients at once: nothing is lost, duplicated or reordered."""

from __future__ import annotations

import pytest
import torch

from benchmarks.trainer import reward_server
from sfgrpo.remote.wire import Limits
from sfgrpo.serving import app
from sfgrpo.serving.device import Device
from tests.support.served import served


def test_images_are_told_apart() -> None:
    images = reward_server.numbered(65_500, 100)
    scores = reward_server.number()(images, [], [])
    assert scores.tolist() == list(range(65_500, 65_600))


@pytest.mark.parametrize(("form", "queue"), [("safetensors", 64), ("png", 8)])
def test_sixty_four_clients(form: str, queue: int) -> None:
    """Also where the queue is too short for them, and they have to come again."""
    device = Device("number", reward_server.number(), limits=Limits(), queue=queue)
    with served(app.build(device, None)) as url:
        found = reward_server.measure(url, 640, clients=64, batch=5, form=form)
    assert found["in order, each once"]
    assert found["scored by the server"] == 640
    if queue < 64:  # a slow machine may send again for other reasons
        assert found["sent again"] > 0
    assert device.counts.queued == device.counts.queued_bytes == 0


def test_what_is_amiss_is_noticed() -> None:
    def swapped(images: torch.Tensor, prompts: object, metadata: object) -> torch.Tensor:
        return torch.arange(len(images) - 1.0, -1.0, -1.0)

    with served(app.build(Device("n", swapped, limits=Limits(), queue=9), None)) as url:
        assert not reward_server.measure(url, 4, 1, 4, "safetensors")["in order, each once"]
