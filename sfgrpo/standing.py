"""A recipe's policy as it stands, for commands that measure it and do not train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfgrpo import backbones, engine, generator, rewards
from sfgrpo.config import Recipe
from sfgrpo.embeddings import backbone_of, negatives
from sfgrpo.policy import Policy, check_start
from sfgrpo.prompts import Prompt, Split
from sfgrpo.rewards import Calls, Mixture
from sfgrpo.rollout import VelocityField
from sfgrpo.run.randomness import reseed
from sfgrpo.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A policy, the prompts it is measured on, and what scores it."""

    recipe: Recipe
    prompts: list[Prompt]
    field: VelocityField
    reward: Mixture
    latent_shape: tuple[int, ...]
    """That of training."""


def altered(recipe: Recipe, **sections: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in its sections."""
    changed = {
        name: getattr(recipe, name).model_copy(update=dict(values))
        for name, values in sections.items()
    }
    return recipe.model_copy(update=changed)


def prepare(
    recipe: Recipe, choose: Callable[[Split], list[Prompt]], *, tally: Tally | None = None
) -> Standing:
    """Load what the recipe names: the policy that its training would start from.

    Args:
        choose: which of the recipe's prompts.
        tally: counts what the field does.

    Raises:
        ValueError: as `sfgrpo.trainer.Trainer`.
        OSError: a model or a file that is not there.
    """
    device = engine.start()
    chosen = choose(generator.prompts_of(recipe))
    # What is quickly found to be wrong comes before the network, which takes minutes to load.
    reward = rewards.load(
        recipe.reward, recipe.reward_options,
        frames=recipe.reward_frames, final_only=recipe.reward_final_only,
        calls=Calls(retries=recipe.reward_retries),
    )  # fmt: skip
    reward.check(chosen, heard=backbones.makes_sound(recipe.model.backbone))
    check_start(recipe.lora)
    backbone, embed = backbone_of(recipe, device, Split(train=chosen, evaluation=[]))
    reseed(recipe.run.seed, 0, 0)
    guidance = recipe.sample.guidance_scale
    # No second copy of the weights, and the first whole: no engine gathers it, and no rank waits
    # for another.
    untrained = altered(
        recipe, train={"beta": 0.0}, deepspeed={"zero_stage": 0}, model={"context_parallel": 1}
    )
    # Adapters that training would start from are part of the policy.
    network = Policy(backbone.transformer, untrained, backbone.lora_targets).network
    return Standing(
        recipe=recipe, prompts=chosen, reward=reward,
        latent_shape=generator.shapes(recipe, backbone)[0],
        field=VelocityField(
            backbone=backbone, network=network,
            conditioning=embed(chosen),
            unconditional=embed(negatives(chosen, recipe)) if guidance != 1 else None,
            guidance=guidance, batch_size=recipe.sample.batch_size,
            tally=Tally() if tally is None else tally,
        ),
    )  # fmt: skip
