"""Pretrain an embedded model: autoencoder first, then text encoders and transformer together.

Rectified flow as in Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206): t is logit-normal,
x_t = (1 - t) x_0 + t x_1, the target is x_1 - x_0. Left out: learning-rate decay of the flow, so
that a shorter run is a prefix of a longer one: a shipped model is stopped early on purpose, before
it is good, since it is there to be improved by reinforcement learning.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from sfgrpo.backbones.sd3 import SD3Backbone, encode_prompts
from sfgrpo.embedded import data
from sfgrpo.embedded.architecture import build_pipeline
from sfgrpo.embedded.autoencoder import encode_images, train_autoencoder, train_decoder
from sfgrpo.embedded.card import write_card
from sfgrpo.embedded.evaluate import evaluate
from sfgrpo.embedded.task import DIGIT, NUMERALS, Task, find

CAPTION_DROPOUT = 0.1
TOKENS = "text_model.embeddings.token_embedding.weight"
TRAINED = ("transformer", "text_encoder", "text_encoder_2")


def pretrain(
    out: Path,
    *,
    task: Task = DIGIT,
    seed: int = 0,
    vae_steps: int | None = None,
    steps: int | None = None,
    latents: int | None = None,
    threads: int | None = None,
    evaluate_every: int = 500,
) -> dict[str, float]:
    """Train the model of `task` and write it to the folder `out`; returns its measured scores.

    `vae_steps` batches fit the autoencoder, `latents` images are then encoded once, and `steps`
    batches of them fit the flow; None is the task's own number of each.

    The result depends on `seed`, the step counts and, in the last bits, on the number of threads
    (`threads`; None leaves PyTorch's own) and the CPU. `evaluate_every` flow steps, scores of a
    few samples are shown; 0 never shows them.

    Raises:
        ValueError: `out` holds anything or cannot be made; a count below 1.
    """
    vae_steps = task.vae_steps if vae_steps is None else vae_steps
    steps = task.steps if steps is None else steps
    for name, count in (("vae_steps", vae_steps), ("steps", steps), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    _make_empty(out)
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    pipeline = build_pipeline(seed, task)
    if task.start is None:
        train_autoencoder(pipeline.vae, task=task, steps=vae_steps, generator=generator)
    else:
        adopt(pipeline, find(task.start))
        train_decoder(pipeline.vae, task=task, steps=vae_steps, seed=seed)
    bank, captions = latent_bank(pipeline.vae, latents or task.images, generator, task)
    averaged = train_flow(
        pipeline,
        bank,
        captions,
        task=task,
        steps=steps,
        generator=generator,
        evaluate_every=evaluate_every,
    )
    minutes = (time.monotonic() - started) / 60
    save(averaged, out)
    scores = evaluate(SD3Backbone(averaged, max_sequence_length=0), task=task, per_digit=24)
    command = f"sfgrpo pretrain OUT --task {task.name} --seed {seed}"
    command += f" --vae-steps {vae_steps} --steps {steps} --threads {torch.get_num_threads()}"
    sizes = [p.numel() for name in ("vae", *TRAINED) for p in getattr(averaged, name).parameters()]
    write_card(
        out, task=task, scores=scores, parameters=sum(sizes), minutes=minutes, command=command
    )
    tqdm.write("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    return scores


def adopt(pipeline: StableDiffusion3Pipeline, source: Task) -> None:
    """Give `pipeline` the autoencoder of another task, and its other weights as a start.

    All but what depends on the size of the images, which is the transformer's positions, and on the
    vocabulary: of tokens those are taken over that both have, and "seven" for "7".
    """
    found = SD3Backbone.load(source.folder / "model", max_sequence_length=0).pipeline
    pipeline.register_modules(vae=found.vae.eval().requires_grad_(False))
    weights = found.transformer.state_dict()
    weights["pos_embed.pos_embed"] = pipeline.transformer.pos_embed.pos_embed
    pipeline.transformer.load_state_dict(weights)
    spelled = {f"{digit}</w>": f"{word}</w>" for digit, word in enumerate(NUMERALS)}
    known = found.tokenizer.get_vocab()
    rows = {
        row: known[spelled.get(token, token)]
        for token, row in pipeline.tokenizer.get_vocab().items()
        if spelled.get(token, token) in known
    }
    for name in ("text_encoder", "text_encoder_2"):
        weights = getattr(found, name).state_dict()
        tokens = getattr(pipeline, name).get_input_embeddings().weight.detach().clone()
        tokens[list(rows)] = weights[TOKENS][list(rows.values())]
        getattr(pipeline, name).load_state_dict({**weights, TOKENS: tokens})


def latent_bank(
    vae: AutoencoderKL, count: int, generator: torch.Generator, task: Task = DIGIT
) -> tuple[Tensor, list[str]]:
    """Scaled latents [count, 4, H / 4, W / 4] of captioned images, and the captions."""
    batch = data.sample(count, split=data.PRETRAINING_DIGITS, generator=generator, task=task)
    raw = encode_images(vae, batch.images)
    latents = (raw - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    return latents.contiguous(), [entry["prompt"] for entry in batch.records]


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    captions: list[str],
    *,
    task: Task = DIGIT,
    steps: int,
    generator: torch.Generator,
    evaluate_every: int,
) -> StableDiffusion3Pipeline:
    """Fit transformer and text encoders; returns a pipeline with their running averages."""
    trained = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED}).train()
    average = AveragedModel(trained, multi_avg_fn=running_average)
    shadow = {name: average.module.get_submodule(name) for name in TRAINED}
    averaged = StableDiffusion3Pipeline(**{**pipeline.components, **shadow})
    optimiser = torch.optim.AdamW(
        trained.parameters(), lr=task.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=0.01, total_iters=200)
    bar = tqdm(range(1, steps + 1), desc="flow", unit="step")
    for step in bar:
        loss = flow_loss(pipeline, latents, captions, generator, task.batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        warmup.step()
        average.update_parameters(trained)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if evaluate_every and step % evaluate_every == 0 and step < steps:
            scores = evaluate(SD3Backbone(averaged, max_sequence_length=0), task=task, per_digit=8)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            bar.write(f"step {step}: {shown}")
    return averaged


def _make_empty(out: Path) -> None:
    """Make the folder before the work of an hour; ValueError if it cannot be, or is not empty."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"'{out}' is not empty: give a new folder")
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"'{out}' cannot be made or written: {error.strerror}") from error


@torch.no_grad()
def running_average(
    averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int
) -> None:
    """Exponential average over about 1000 steps, over fewer at first: the start is forgotten."""
    decay = min(0.999, (1 + float(updates)) / (10 + float(updates)))
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 - decay)


def flow_loss(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    captions: list[str],
    generator: torch.Generator,
    batch: int,
) -> Tensor:
    """Rectified-flow matching loss of one random batch, with caption dropout."""
    chosen = torch.randint(len(latents), (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    prompts = [
        "" if drop else captions[index]
        for index, drop in zip(chosen.tolist(), dropped.tolist(), strict=True)
    ]
    x_0 = latents[chosen]
    x_1 = torch.randn(x_0.shape, generator=generator)
    t = torch.randn(batch, generator=generator).sigmoid()
    x_t = torch.lerp(x_0, x_1, t[:, None, None, None])
    cond = encode_prompts(pipeline, prompts, 0)
    (velocity,) = pipeline.transformer(
        hidden_states=x_t,
        timestep=t * 1000,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        return_dict=False,
    )
    return F.mse_loss(velocity, x_1 - x_0)


def save(pipeline: StableDiffusion3Pipeline, out: Path) -> None:
    """Write the pipeline folder with float16 weights; the pipeline is left in what was written."""
    for dtype in (torch.float16, torch.float32):
        for name in ("vae", *TRAINED):
            nn.Module.to(getattr(pipeline, name), dtype)
        if dtype == torch.float16:
            pipeline.save_pretrained(out, safe_serialization=True)
