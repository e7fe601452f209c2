"""The SD3 backbone does exactly what diffusers' own pipeline does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from sfgrpo import backbones
from sfgrpo.backbones.sd3 import SD3Backbone, load
from sfgrpo.embedded.architecture import build_pipeline, initialise

PROMPTS = ["a red seven on a dark blue background", "an orange two on a black background", ""]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    """Random weights, none of them zero, in place of trained ones."""
    pipeline = build_pipeline(3)
    torch.manual_seed(4)
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return pipeline


@pytest.fixture(scope="module")
def backbone(pipeline: StableDiffusion3Pipeline) -> SD3Backbone:
    return SD3Backbone(pipeline, max_sequence_length=0)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def euler(backbone: SD3Backbone, x: torch.Tensor, prompts: list[str], guidance: float, steps: int):
    cond, free = backbone.encode(prompts), backbone.encode([""] * len(prompts))
    for t, s in pairwise(backbone.sigmas(steps, tuple(x.shape[1:]))):
        times = t.expand(len(prompts))
        v = backbone.velocity(backbone.transformer, x, times, cond)
        if guidance != 1.0:
            v_free = backbone.velocity(backbone.transformer, x, times, free)
            v = v_free + guidance * (v - v_free)
        x = x + (s - t) * v
    return backbone.decode(x)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_backbone_is_the_stock_pipeline(
    pipeline: StableDiffusion3Pipeline, guidance: float, shift: float
) -> None:
    pipeline = StableDiffusion3Pipeline(
        **{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    )
    pipeline.set_progress_bar_config(disable=True)
    start: Any = noise(3)
    (expected,) = pipeline(
        prompt=PROMPTS,
        latents=start,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=32,
        width=32,
        max_sequence_length=0,
        output_type="pt",
        return_dict=False,
    )
    images = euler(SD3Backbone(pipeline, max_sequence_length=0), noise(3), PROMPTS, guidance, 4)
    assert images.std() > 0.01
    # Four float32 steps and a decoder, in the same order; guidance batches the two calls as one.
    torch.testing.assert_close(images, expected, atol=2e-5, rtol=0)


def test_sigmas_are_those_of_sd35() -> None:
    pipeline = build_pipeline(0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    backbone = SD3Backbone(pipeline, max_sequence_length=0)
    known = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    sigmas = backbone.sigmas(10, (4, 8, 8))
    torch.testing.assert_close(sigmas, torch.tensor(known), atol=5e-5, rtol=0)
    assert backbone.sigmas(1, (4, 8, 8)).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        backbone.sigmas(0, (4, 8, 8))


def test_conditioning_rows(backbone: SD3Backbone) -> None:
    cond = backbone.encode(PROMPTS)
    assert len(cond) == 3
    assert cond.tokens.shape == (3, 12, 128)
    assert cond.pooled is not None
    assert cond.pooled.shape == (3, 128)
    assert not cond.tokens.requires_grad
    rows = cond.rows(torch.tensor([2, 0, 0]))
    assert torch.equal(rows.tokens, cond.tokens[[2, 0, 0]])
    assert rows.pooled is not None
    assert torch.equal(rows.pooled, cond.pooled[[2, 0, 0]])
    both = backbones.Conditioning.cat([cond, rows])
    assert both.pooled is not None
    assert torch.equal(both.pooled[3:], rows.pooled)
    assert cond.to("cpu", torch.bfloat16).tokens.dtype == torch.bfloat16
    # A prompt's conditioning does not depend on its neighbours.
    alone = backbone.encode(PROMPTS[1:2])
    torch.testing.assert_close(alone.tokens[0], cond.tokens[1], atol=1e-5, rtol=0)


def test_absent_t5_pads_zeros(pipeline: StableDiffusion3Pipeline) -> None:
    padded = SD3Backbone(pipeline, max_sequence_length=5).encode(PROMPTS)
    assert padded.tokens.shape == (3, 17, 128)
    assert not padded.tokens[:, 12:].any()
    with pytest.raises(ValueError, match="max_sequence_length must be >= 0"):
        SD3Backbone(pipeline, max_sequence_length=-1)


def test_one_string_is_not_a_list_of_prompts(backbone: SD3Backbone) -> None:
    with pytest.raises(TypeError, match="one string"):
        backbone.encode("a red seven on a black background")


def test_velocity_trains_the_given_module_only(backbone: SD3Backbone) -> None:
    x, cond = noise(3), backbone.encode(PROMPTS)
    t = torch.tensor([1.0, 0.5, 0.01])
    backbone.velocity(backbone.transformer, x, t, cond).square().mean().backward()
    grads = [p.grad for p in backbone.transformer.parameters()]
    assert sum(bool(g is not None and g.any()) for g in grads) > 0.9 * len(grads)
    frozen = [backbone.pipeline.vae, backbone.pipeline.text_encoder]
    assert all(not p.requires_grad for module in frozen for p in module.parameters())
    backbone.transformer.zero_grad(set_to_none=True)
    other = build_pipeline(9).transformer
    with torch.no_grad():
        assert not backbone.velocity(other, x, t, cond).any()  # freshly initialised: zero output


def test_rows_at_different_times_are_independent(backbone: SD3Backbone) -> None:
    x, cond, t = noise(3), backbone.encode(PROMPTS), torch.tensor([1.0, 0.5, 0.01])
    with torch.no_grad():
        together = backbone.velocity(backbone.transformer, x, t, cond)
        row = torch.tensor([1])
        alone = backbone.velocity(backbone.transformer, x[1:2], t[1:2], cond.rows(row))
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


def test_lora_targets_exist(backbone: SD3Backbone) -> None:
    names = [name for name, _ in backbone.transformer.named_modules()]
    for target in backbone.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target


def test_decode_does_not_depend_on_the_batch(pipeline: StableDiffusion3Pipeline) -> None:
    whole = SD3Backbone(pipeline, max_sequence_length=0).decode(noise(5))
    split = SD3Backbone(pipeline, max_sequence_length=0, decode_batch=2).decode(noise(5))
    assert whole.shape == (5, 3, 32, 32)
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)


def test_latent_shape(backbone: SD3Backbone) -> None:
    assert backbone.image_size == (32, 32)
    assert backbone.latent_shape(32, 16) == (4, 8, 4)
    for height, width, message in ((30, 32, "height"), (32, 0, "width"), (64, 32, "64")):
        with pytest.raises(ValueError, match=message):
            backbone.latent_shape(height, width)


def test_a_saved_pipeline_loads_by_name(
    backbone: SD3Backbone, pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = backbones.load("sd3", tmp_path, max_sequence_length=0)
    torch.testing.assert_close(
        euler(load(tmp_path, max_sequence_length=0), noise(1), PROMPTS[:1], 1.0, 2),
        euler(backbone, noise(1), PROMPTS[:1], 1.0, 2),
        atol=1e-5,
        rtol=0,
    )
    half = backbones.load("sd3", tmp_path, max_sequence_length=0, dtype=torch.bfloat16)
    assert half.encode(PROMPTS).tokens.dtype == half.dtype == torch.bfloat16
    assert half.decode(noise(1).bfloat16()).dtype == torch.float32
    velocity = half.velocity(half.transformer, noise(3), torch.ones(3), half.encode(PROMPTS))
    assert velocity.dtype == torch.float32
    assert loaded.device.type == "cpu"


def test_unknown_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown backbone 'sd35'; did you mean 'sd3'"):
        backbones.load("sd35", tmp_path)
    with pytest.raises(OSError, match=tmp_path.name):
        backbones.load("sd3", tmp_path)


def test_initialised_blocks_are_identities() -> None:
    transformer = build_pipeline(0).transformer
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter)
    initialise(transformer)
    assert not transformer.proj_out.weight.any()
    assert transformer.transformer_blocks[0].ff.net[2].weight.any()


def test_text_encoders_alone_embed_as_the_whole_pipeline_does() -> None:
    """Without T5 the pipeline asks the network's configuration how wide to pad."""
    prompts = ["a red seven on a blue background", ""]
    alone = load("embedded", max_sequence_length=0, text_encoders="only").encode(prompts)
    whole = load("embedded", max_sequence_length=0).encode(prompts)
    assert torch.equal(alone.tokens, whole.tokens)
    assert alone.pooled is not None
    assert whole.pooled is not None
    assert torch.equal(alone.pooled, whole.pooled)
