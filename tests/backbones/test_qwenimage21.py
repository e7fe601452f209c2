"""Qwen-Image 2.1 beyond what all families share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfgrpo import backbones
from sfgrpo.doctor import published
from tests.support.families import FAMILIES, qwen3


def loaded(**more: Any) -> Any:
    pipeline = qwen3.qwenimage21(**more)
    return backbones.load("qwenimage21", "none", pipeline=pipeline, max_sequence_length=256)


def test_what_is_transparent_is_white() -> None:
    made = loaded(in_channels=4, out_channels=4)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def shown(opacity: float) -> tuple[Tensor, Tensor]:
        decode = type(made.pipeline.vae).decode
        colours = decode(made.pipeline.vae, made._unnormalised(latents[:, :, None])).sample
        colours[:, 3] = 2 * opacity - 1
        made.pipeline.vae.decode = lambda *_, **__: (colours,)
        return made.decode(latents), colours[:, :3, 0] / 2 + 0.5

    clear, _ = shown(0.0)
    assert torch.equal(clear, torch.ones(2, 3, 64, 64))
    opaque, colours = shown(1.0)
    torch.testing.assert_close(opaque, colours)
    half, colours = shown(0.5)
    torch.testing.assert_close(half, (colours + 1) / 2)


def test_the_author_s_noise_levels_are_taken_where_there_are_as_many() -> None:
    made, plain = loaded(), FAMILIES["qwenimage21"].build()
    own = [1.0, 0.8, 0.4]
    made.pipeline.register_to_config(sample_sigmas=own)
    shape = made.latent_shape(64, 64)
    plain.scheduler.set_timesteps(sigmas=own, mu=made._schedule(3, shape)["mu"])
    torch.testing.assert_close(made.sigmas(3, shape), plain.scheduler.sigmas)
    longer = made.sigmas(4, shape)
    made.pipeline.register_to_config(sample_sigmas=None)
    assert torch.equal(made.sigmas(4, shape), longer)


def test_a_prompt_is_painted_alike_beside_a_longer_one() -> None:
    """The stock network counts the longest prompt of a batch for all of them."""
    made = loaded()
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    t = torch.tensor([0.7, 0.7])
    cond = made.encode(["one", "a much longer prompt than that"])
    with torch.no_grad():
        beside = made.velocity(made.transformer, x, t, cond)[0]
        alone = made.velocity(made.transformer, x[:1], t[:1], made.encode(["one"]))[0]
        stock = FAMILIES["qwenimage21"].build().transformer
        tokens, size = x.flatten(2).transpose(1, 2), (1, 4, 4)
        slots = torch.arange(cond.tokens.shape[1] + 4) >= cond.tokens.shape[1]
        (found,) = stock(
            tokens, cond.tokens, t, [[size]] * 2, slots.expand(2, -1), cond.mask, return_dict=False
        )
    torch.testing.assert_close(beside, alone)
    other = found[0, -16:].T.reshape(4, 4, 4)
    assert (other - alone).abs().max() > 1e-2  # it does matter


def test_the_doctor_builds_it_without_its_processor(tmp_path: Path) -> None:
    FAMILIES["qwenimage21"].build().save_pretrained(tmp_path)
    made = published.describe(tmp_path).build(torch.bfloat16)
    assert type(made).__name__ == "QwenImage21Pipeline"
    assert made.components["processor"] is None
