"""Judges that training never sees.

A reward model can be satisfied by images that are no longer digits of any kind, or all the same
digit; in a trial without KL both the recogniser and a classifier reached 1.00 on near-identical
digits over a grey checkerboard. So three judges, all fitted on digits kept from the generator: a
classifier, the spread of the images of one prompt, and the distance from real images.

All three look at ink, not colour (the colour reward does that): how far a pixel is from the
background. The classifier and the distance look at one digit at a time, in its cell of the line;
they are fitted on demand, once per process and task, the same every time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

from sfgrpo.embedded import data
from sfgrpo.embedded.task import DIGIT, Task, find
from sfgrpo.rewards.ocr import Recogniser
from sfgrpo.run.alarms import better

FIT_IMAGES = 2400
COMPONENTS = 32
NORMALISED_SIZE = 12


def ink(images: Tensor) -> Tensor:
    """Ink [B, H, W] in [0, 1] of images [B, 3, H, W]: distance of each pixel from the background.

    The background is the median of the outermost pixels; the scale is the image's own (0.98
    quantile), but at least 0.1, so that the noise of a plain field stays small.
    """
    edge = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    edge[1:-1, 1:-1] = False
    background = images[:, :, edge].median(dim=2).values
    distance = (images - background[:, :, None, None]).norm(dim=1)
    scale = distance.flatten(1).quantile(0.98, dim=1).clamp_min(0.1)
    return (distance / scale[:, None, None]).clamp(0, 1)


def _cells(images: Tensor, task: Task) -> Tensor:
    """Ink of each digit's cell, [B L, S, S]: images [B, 3, H, W] cut, each padded to a square."""
    shapes, wide = ink(images.float().cpu()), math.ceil(task.width / task.digits)
    starts = np.linspace(0, task.width - wide, task.digits).round().astype(int)
    cells = torch.stack([shapes[:, :, start : start + wide] for start in starts], 1).flatten(0, 1)
    missing = task.height - wide
    return F.pad(cells, (missing // 2, missing - missing // 2))


def _pooled(cells: Tensor) -> np.ndarray:
    """Ink [B, S, S] at half the resolution, [B, S S / 4] float64."""
    return F.avg_pool2d(cells[:, None], 2).flatten(1).double().numpy()


def _normalised(cells: Tensor) -> np.ndarray:
    """Ink [B, S, S] moved to its centre of mass and scaled to its spread, [B, 144]: shape without
    place."""
    side = cells.shape[-1]
    axis = (torch.arange(side, dtype=cells.dtype, device=cells.device) + 0.5) * 2 / side - 1
    weight = cells / cells.sum((1, 2), keepdim=True).clamp_min(1e-6)
    across, down = weight.sum(1), weight.sum(2)
    x, y = across @ axis, down @ axis
    wide = (across * (axis - x[:, None]).square()).sum(1).sqrt()
    high = (down * (axis - y[:, None]).square()).sum(1).sqrt().clamp_min(0.05)
    theta = cells.new_zeros(len(cells), 2, 3)
    # A stroke is not stretched to a square: a "1" stays narrow.
    theta[:, 0, 0] = 1.9 * torch.maximum(wide, 0.6 * high)
    theta[:, 1, 1] = 1.9 * high
    theta[:, 0, 2], theta[:, 1, 2] = x, y
    shape = [len(cells), 1, NORMALISED_SIZE, NORMALISED_SIZE]
    grid = F.affine_grid(theta, shape, align_corners=False)
    return F.grid_sample(cells[:, None], grid, align_corners=False).flatten(1).double().numpy()


@cache
def _real(task: Task) -> tuple[Tensor, np.ndarray]:
    """What the judges are fitted on: `FIT_IMAGES` cells of real images, and their digits."""
    generator = torch.Generator("cpu").manual_seed(20_240)
    count = FIT_IMAGES // task.digits
    batch = data.sample(count, split=data.JUDGE_DIGITS, generator=generator, task=task)
    return _cells(batch.images, task), batch.labels.numpy()


@cache
def _classifier(task: Task) -> SVC:
    cells, labels = _real(task)
    return SVC(C=10.0, gamma="scale").fit(_normalised(cells), labels)


@cache
def _recogniser() -> Recogniser:
    return Recogniser(threads=1, batch=64)


@cache
def _projection(task: Task) -> tuple[PCA, np.ndarray, np.ndarray]:
    """Principal components of real cells, and mean and covariance in them."""
    cells, _ = _real(task)
    pooled = _pooled(cells)
    pca = PCA(COMPONENTS, svd_solver="full").fit(pooled)
    return pca, *_moments(pca.transform(pooled))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


@better(classifier_accuracy="higher", diversity="higher", distance_to_real="lower")
def judge(
    images: Tensor, metadata: Sequence[Mapping[str, Any]], *, task: str = DIGIT.name
) -> dict[str, float]:
    """All three judges on images [P, N, 3, H, W] of P prompts, N >= 2, of the task called `task`.

    `metadata` has one entry per prompt, whose "text" is what is to be read.
    """
    kind, flat = find(task), images.flatten(0, 1)
    texts = [entry["text"] for entry in metadata for _ in range(images.shape[1])]
    return {
        "classifier_accuracy": classifier_accuracy(flat, texts, kind),
        "diversity": diversity(images),
        "distance_to_real": distance_to_real(flat, kind),
    }


@better(read_as_asked="higher")
def reading(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of images [P, N, 3, H, W] that OCR reads as asked, letter by letter: what the rewards
    of OCR come to. So no judge of its own, but a number that one can see in the pictures."""
    texts = [entry["text"] for entry in metadata for _ in range(images.shape[1])]
    found = _recogniser().read(images.flatten(0, 1))
    return {"read_as_asked": sum(map(operator.eq, found, texts)) / len(texts)}


def classifier_accuracy(images: Tensor, texts: Sequence[str], task: Task = DIGIT) -> float:
    """Share of images [B, 3, H, W] that a support vector machine reads as `texts` (numerals): every
    digit of them."""
    digits = _classifier(task).predict(_normalised(_cells(images, task)))
    asked = np.array([[int(char) for char in text] for text in texts])
    return float((digits.reshape(asked.shape) == asked).all(1).mean())


def diversity(images: Tensor) -> float:
    """Mean distance between two images of the same prompt; 0 if all are the same.

    `images` is [P, N, 3, H, W], N >= 2; the distance is the root mean square difference of ink.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"need [P, N >= 2, 3, H, W], got {tuple(images.shape)}")
    prompts, group = images.shape[:2]
    shapes = ink(images.flatten(0, 1).float().cpu()).reshape(prompts, group, -1)
    rms = torch.cdist(shapes, shapes) / shapes.shape[-1] ** 0.5
    return float(rms.sum() / (prompts * group * (group - 1)))


def distance_to_real(images: Tensor, task: Task = DIGIT) -> float:
    """Frechet distance between the digits of images [B, 3, H, W] and held-out real ones.

    Between Gaussians fitted in the first 32 principal components of real ink (Dowson and Landau
    1982; the FID's formula with other features). Biased upwards for small B: compare equal B, of
    at least 200.
    """
    pca, mean, cov = _projection(task)
    other_mean, other_cov = _moments(pca.transform(_pooled(_cells(images, task))))
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_cov @ root).clip(0)).sum()
    return float(
        np.square(mean - other_mean).sum() + np.trace(cov) + np.trace(other_cov) - 2 * cross
    )
