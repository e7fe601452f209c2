"""Images from fixed noise by the plain ODE, their rewards, and what the judges say of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from sfgrpo import engine, sde
from sfgrpo.backbones.base import Modality
from sfgrpo.config import Recipe
from sfgrpo.guard import Guard, NonFinite
from sfgrpo.names import blaming
from sfgrpo.prompts import Prompt, spread
from sfgrpo.rewards import Mixture, RewardError, Sound, evenly
from sfgrpo.rewards.base import staying
from sfgrpo.rollout import Plan, VelocityField, batches, sample
from sfgrpo.score import heard, measure
from sfgrpo.stream import InOrder

HELD_OUT = 2**62
"""Noise ids from here on belong to evaluation; training counts up from 0 and never gets here."""

STRIP = 4
"""Frames of each video that are kept."""
WHOLE = 4
"""Videos that are kept with all their frames."""

TAKEN = ("iteration", "dropped_images", "alarms")
"""Names in the log of evaluations that no judge may use."""

Judge = Callable[[Tensor, Sequence[Mapping[str, Any]]], Mapping[str, float]]
"""`(images [P, N, 3, H, W] in [0, 1], metadata of the P prompts) -> named numbers`; of videos, the
strips that are kept, and of other samples what the backbone decodes."""


@dataclass(frozen=True)
class Evaluation:
    """The result, the same on every rank."""

    numbers: dict[str, float]
    samples_PN: Tensor
    """uint8 `[P, N, 3, H, W]`: images, or of each video a strip of `STRIP` frames side by side;
    float `[P, N, ...]` of a generator that makes neither."""
    prompts: list[Prompt]
    per_prompt: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    """The mean scores of each prompt; None where no image of it has a finite reward."""
    better: dict[str, str] = dataclasses.field(default_factory=dict)
    """Which way is better, "higher" or "lower", of the judges' numbers that say so."""
    videos: Tensor | None = None
    """uint8 `[K, F, 3, H, W]` on rank 0: the first `WHOLE` videos with all their frames."""


def held_out_plan(prompts: int, images: int, device: torch.device, *, context: int = 1) -> Plan:
    """Every image its own noise; this rank's contiguous share, padded to equal lengths, and those
    of the others in a group of `context` neighbours."""
    total, (group, _) = prompts * images, engine.context_group(context)
    share = -(-total // engine.world()) * context
    index = torch.arange(group * share, (group + 1) * share, device=device)
    return Plan(
        group_G=index + HELD_OUT,
        prompt_G=index.clamp_max(total - 1) // images,
        group_of_M=torch.arange(share, device=device),
        sample_M=index + HELD_OUT,
    )


@torch.no_grad()
def evaluate(
    field: VelocityField,
    prompts: Sequence[Prompt],
    score: Callable[[Tensor, Tensor, Sequence[Sound] | None], Mapping[str, Tensor]],
    judges: Sequence[Judge],
    *,
    seed: int,
    num_steps: int,
    images_per_prompt: int,
    latent_shape: tuple[int, ...],
    with_sound: bool = False,
    ahead: int = 0,
    scored: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Sample `images_per_prompt` images of every prompt and measure them.

    Args:
        field: the policy, with the conditioning of exactly these prompts.
        score: `(images, prompt rows, what is heard with each) -> {name: [B]}`.
        with_sound: whether `score` is told what is heard; otherwise no sound is made.
        ahead: batches of samples that may wait for their scores, see `sfgrpo.stream`.
        scored: called once this rank's images have their scores.
    """
    table = sde.coefficients(field.backbone.sigmas(num_steps, latent_shape), "ode")
    plan = held_out_plan(
        len(prompts), images_per_prompt, field.backbone.device, context=field.context
    )
    # What a context group samples together its ranks decode and score apart.
    share, place = len(plan.sample_M) // field.context, engine.rank() % field.context
    own = slice(place * share, (place + 1) * share)
    total, kept, whole = len(prompts) * images_per_prompt, [], []
    bar = tqdm(
        total=share, desc="evaluation", unit="image", leave=False, delay=2,
        disable=engine.rank() != 0, dynamic_ncols=True,
    )  # fmt: skip
    with bar, InOrder[Mapping[str, Tensor]](ahead) as asked:
        for prompt, latents, decoded in _decoded(field, table, plan, own, seed, latent_shape):
            sounds = heard(field.backbone, latents) if with_sound else None
            asked.ask(partial(score, decoded, prompt, sounds))
            kept.append(picture(decoded, field.backbone.modality))
            if field.backbone.modality == "video" and engine.rank() == 0:
                # The first videos are rank 0's, so that none of them travels.
                whole += _bytes(decoded[: min(WHOLE, total) - len(whole)]).cpu()
            bar.update(len(decoded))
        scores = asked.answers()
    scored()
    index = plan.sample_M[own] - HELD_OUT
    gathered = {
        name: engine.gather(torch.cat([s[name] for s in scores]), index)[:total]
        for name in scores[0]
    }
    numbers = means(gathered)
    gathered_samples = engine.gather(torch.cat(kept), index)[:total].cpu()
    samples_PN = gathered_samples.unflatten(0, (len(prompts), images_per_prompt))
    judged = samples_PN.float() / 255 if samples_PN.dtype == torch.uint8 else samples_PN
    for judge in judges:
        numbers.update(_verdict(judge, judged, prompts, taken={*TAKEN, *numbers}))
    better = {k: v for judge in judges for k, v in getattr(judge, "better", {}).items()}
    return Evaluation(
        numbers, samples_PN, list(prompts),
        per_prompt=_per_prompt(gathered, images_per_prompt), better=better,
        videos=torch.stack(whole) if whole else None,
    )  # fmt: skip


def _decoded(
    field: VelocityField, table: Tensor, plan: Plan, own: slice, seed: int,
    latent_shape: tuple[int, ...],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(prompt rows, latents, samples) of a few trajectories of the plan after the other; of `own`
    alone."""
    for rows in batches(len(plan.sample_M), field.batch_size):
        part = Plan(
            group_G=plan.group_G[rows],
            prompt_G=plan.prompt_G[rows],
            group_of_M=torch.arange(rows.stop - rows.start, device=plan.sample_M.device),
            sample_M=plan.sample_M[rows],
        )
        made = sample(field, table, part, seed=seed, latent_shape=latent_shape, methods={})
        mine = slice(max(own.start - rows.start, 0), max(own.stop - rows.start, 0))
        prompt, x = part.prompt_G[mine], made.states.x_U[mine]
        for few in batches(len(x), field.backbone.decode_batch):
            yield prompt[few], x[few], field.backbone.decode(x[few])


def of_recipe(
    recipe: Recipe,
    field: VelocityField,
    prompts: Sequence[Prompt],
    reward: Mixture,
    judges: Sequence[Judge],
    guard: Guard,
    *,
    iteration: int,
    latent_shape: tuple[int, ...],
    scored: Callable[[], object] = lambda: None,
) -> Evaluation:
    """`evaluate` as the recipe has it; `field` has the conditioning of exactly these prompts.

    Raises:
        NonFinite: an image's reward is not finite, and the recipe wants to stop then.
    """
    guard.begin(iteration, prompts)

    def score(images: Tensor, rows: Tensor, sounds: Sequence[Sound] | None) -> Mapping[str, Tensor]:
        scores = measure(reward, images, rows, prompts, sounds=sounds)
        return guard.images(scores, rows, reward.calls.failures, images)

    return evaluate(
        field, prompts, score, judges,
        seed=recipe.run.seed, num_steps=recipe.eval.num_steps,
        images_per_prompt=recipe.eval.images_per_prompt, latent_shape=latent_shape,
        with_sound=bool(reward.takes_sound), ahead=recipe.reward_ahead, scored=scored,
    )  # fmt: skip


def _verdict(
    judge: Judge, samples_PN: Tensor, prompts: Sequence[Prompt], *, taken: Collection[str]
) -> dict[str, float]:
    """What a judge says of the samples, of which it gets copies as a reward does; what is not
    finite is left out, with a warning.

    Raises:
        RewardError: it raises, returns what is no number, or a name that is `taken`, or calls
            sys.exit.
    """
    module, function = (getattr(judge, name, "?") for name in ("__module__", "__qualname__"))
    who = f"eval.judges: '{module}:{function}'"
    with blaming(RewardError, f"{who} failed"), staying(who):
        found = judge(samples_PN.clone(), [copy.deepcopy(p.metadata) for p in prompts])
    if not isinstance(found, Mapping):
        raise RewardError(f"{who} returned {type(found).__name__}, expected named numbers")
    numbers = {}
    for name, value in found.items():
        if name in taken:
            raise RewardError(f"{who} returned '{name}', a name that is taken; choose another")
        try:
            number = float(value)  # also a tensor or an array of one number
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(
                f"{who} returned {type(value).__name__} for '{name}', expected one number"
            ) from None
        if math.isfinite(number):
            numbers[str(name)] = number
        elif engine.rank() == 0:
            warnings.warn(f"{who} returned {number} for '{name}': left out", stacklevel=2)
    return numbers


def picture(samples: Tensor, modality: Modality) -> Tensor:
    """What is kept of decoded samples: see `Evaluation.samples_PN`."""
    if modality == "other":
        return samples.float()
    if modality == "video":
        shown = samples[:, evenly(STRIP, samples.shape[1])]
        samples = rearrange(shown, "b f c h w -> b c h (f w)")
    return _bytes(samples)


def _bytes(samples: Tensor) -> Tensor:
    return (samples * 255).round().to(torch.uint8)


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each score over the images whose reward is finite; `dropped_images` counts the
    others, if there are any."""
    kept = scores["reward"].isfinite()
    if not kept.any():
        raise NonFinite(f"none of the {len(kept)} images of the evaluation has a finite reward")
    numbers = {name: values[kept].mean().item() for name, values in scores.items()}
    return numbers if kept.all() else {**numbers, "dropped_images": int((~kept).sum())}


def _per_prompt(scores: Mapping[str, Tensor], images: int) -> dict[str, list[float | None]]:
    """Mean of each score over a prompt's images whose reward is finite."""
    finite_PN = scores["reward"].isfinite().unflatten(0, (-1, images))
    found = {}
    for name, values in scores.items():
        kept_PN = values.double().unflatten(0, (-1, images)).where(finite_PN, 0)
        means = (kept_PN.sum(1) / finite_PN.sum(1)).tolist()
        found[name] = [mean if math.isfinite(mean) else None for mean in means]
    return found


def chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The prompts that evaluation shows."""
    return [prompts[i] for i in spread(count, len(prompts))]
