"""Fit an embedded model's autoencoder.

Absolute error and a small Kullback-Leibler term. Left out: discriminator and perceptual loss, which
flat colours do not need. A task that starts from another's model keeps the encoder, and so the
latents: the decoder alone is fitted to the new images, or it would smear what it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from sfgrpo.embedded import data
from sfgrpo.embedded.task import Task

VAE_BATCH = 96
"""Digits in a batch."""
KL_WEIGHT = 1e-3


def train_autoencoder(
    vae: AutoencoderKL, *, task: Task, steps: int, generator: torch.Generator
) -> None:
    """Fit the autoencoder, then set its scaling so that latents have mean 0 and variance 1."""

    def loss() -> Tensor:
        images = autoencoder_images(task, generator)
        (posterior,) = vae.encode(images, return_dict=False)
        decoded = vae.decoder(posterior.sample(generator))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, images) + KL_WEIGHT * kl

    fit(vae, loss, steps=steps, name="autoencoder")
    batch = data.sample(2000, split=data.PRETRAINING_DIGITS, generator=generator, task=task)
    latents = encode_images(vae, batch.images)
    vae.register_to_config(
        shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std())
    )


def train_decoder(vae: AutoencoderKL, *, task: Task, steps: int, seed: int) -> None:
    """Fit the decoder to images of `task`; latents stay what they are.

    Random numbers of its own, so that the flow does not depend on how many steps this took.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def loss() -> Tensor:
        images = autoencoder_images(task, generator)
        return F.l1_loss(vae.decoder(encode_images(vae, images / 2 + 0.5)), images)

    fit(vae.decoder, loss, steps=steps, name="decoder")
    vae.eval().requires_grad_(False)


def fit(network: nn.Module, loss: Callable[[], Tensor], *, steps: int, name: str) -> None:
    """Minimise `loss` by AdamW over the parameters of `network`, which are frozen afterwards."""
    network.train().requires_grad_(True)
    nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-2
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2e-3, total_steps=max(steps, 2), pct_start=0.1
    )
    bar = tqdm(range(steps), desc=name, unit="step")
    for _ in bar:
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
    network.eval().requires_grad_(False)


def autoencoder_images(task: Task, generator: torch.Generator) -> Tensor:
    """A batch in [-1, 1], half of it in colours beyond the palette."""
    count, half = VAE_BATCH // task.digits, VAE_BATCH // task.digits // 2
    split = data.PRETRAINING_DIGITS
    batch = data.sample(count, split=split, generator=generator, task=task)
    masks, _ = data.digits(split)
    chosen = torch.randint(len(masks), (half * task.digits,), generator=generator)
    ink = data.enlarge(masks[chosen], generator, task)
    front, back = torch.rand(2, half, 3, 1, 1, generator=generator).unbind()
    images = torch.cat([batch.images[half:], back + ink * (front - back)])
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means [B, 4, H / 4, W / 4] of images in [0, 1], before scaling."""
    parts = (images * 2 - 1).split(250)
    return torch.cat([vae.encode(part, return_dict=False)[0].mean for part in parts])
