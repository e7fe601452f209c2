"""The diffusers scheduler in real pipelines of five families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfgrpo.backbones import EMBEDDED
from sfgrpo.backbones.sd3 import load
from sfgrpo.scheduler import FlowMatchSDEScheduler

stock: Any = diffusers  # its lazy exports are invisible to type checkers
Euler = stock.FlowMatchEulerDiscreteScheduler
DYNAMIC = {"use_dynamic_shifting": True}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_embedded_pipeline_end_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = load("embedded", max_sequence_length=0).pipeline
    prompts = ["a red seven on a blue background", "an orange two on a black background"]

    def sample(pipeline: Any, prompts: list[str], *seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            prompts, generator=generators, num_inference_steps=10, guidance_scale=2.0, height=32,
            width=32, max_sequence_length=0, output_type="pt",
        ).images  # fmt: skip

    pipeline.scheduler = FlowMatchSDEScheduler.from_config(pipeline.scheduler.config, sampler="cps")
    with pipeline.scheduler.record() as trajectory:
        images = sample(pipeline, prompts, 1, 2)
    assert (trajectory.latents.shape[1:], trajectory.clean.shape[1]) == ((11, 4, 8, 8), 10)
    assert (trajectory.log_probs[:, :-1] != 0).all()
    pipeline.save_pretrained(tmp_path)
    caplog.clear()
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    loaded = type(pipeline).from_pretrained(tmp_path, **absent)
    loaded.scheduler.set_sample_ids([1])
    torch.testing.assert_close(sample(loaded, prompts[1:], 2), images[1:], rtol=0, atol=1e-4)
    for folder, scheduler in ((EMBEDDED["embedded"], loaded.scheduler), (tmp_path, Euler())):
        other = type(pipeline).from_pretrained(folder, scheduler=scheduler, **absent)
        assert other.scheduler is scheduler
    assert not caplog.records  # no warning of diffusers


# Size of the transformer, the scheduler that such pipelines come with, what a call wants.
TWO = {"num_attention_heads": 2, "num_layers": 1}
EMBEDS = {"prompt_embeds": normal(2, 5, 32), "negative_prompt_embeds": normal(2, 5, 32)}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Flux": ({
        **TWO, "in_channels": 4, "num_single_layers": 1, "attention_head_dim": 16,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    }, DYNAMIC, {"prompt_embeds": normal(2, 5, 32), "pooled_prompt_embeds": normal(2, 32)}),
    "Wan": ({
        **TWO, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 32,
    }, {"shift": 3.0}, {**EMBEDS, "num_frames": 5, "guidance_scale": 2.0}),
    "QwenImage": ({
        **TWO, "in_channels": 16, "out_channels": 4, "attention_head_dim": 16,
        "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4),
    }, {**DYNAMIC, "shift_terminal": 0.02}, EMBEDS),
    "ZImage": ({
        "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
    }, {"shift": 3.0}, {"prompt_embeds": [*normal(2, 5, 32)], "guidance_scale": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_pipelines(family: str, dtype: torch.dtype) -> None:
    size, shifting, options = FAMILIES[family]
    torch.manual_seed(0)
    transformer = getattr(stock, f"{family}Transformer{2 + (family == 'Wan')}DModel")(**size)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base = Euler(**shifting)
    pipeline_class = getattr(stock, f"{family}Pipeline")
    parts = dict.fromkeys(pipeline_class._get_signature_keys(pipeline_class)[0])
    pipeline = pipeline_class(**{**parts, "scheduler": base, "transformer": transformer.to(dtype)})
    cast = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in options.items()}

    def sample(scheduler: Any) -> Tensor:
        pipeline.scheduler = scheduler
        return pipeline(
            **cast, height=32, width=32, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0), return_dict=False,
        )[0]  # fmt: skip

    ode = sample(FlowMatchSDEScheduler.from_config(base.config, sampler="ode"))
    # The base class rounds dt v, and Wan's latents, to bf16; ours does neither.
    near = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 0.05, "check_dtype": False}
    torch.testing.assert_close(ode, sample(base), **near)
    noisy = FlowMatchSDEScheduler.from_config(base.config)
    with noisy.record() as trajectory:
        final = sample(noisy)
    assert final.dtype == (dtype if family in ("Flux", "QwenImage") else torch.float32)
    assert torch.equal(trajectory.latents[:, -1], final)
    assert torch.equal(trajectory.latents[:, 1:], trajectory.next_latents)
    assert (trajectory.log_probs[:, 1:3] != 0).all()
