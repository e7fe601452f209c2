"""What is measured of every family: parity with its stock pipeline, an iteration, its export.

python -m benchmarks.trainer.family_checks        the table of benchmarks/results/families_cpu.md
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfgrpo import backbones, config, embeddings, ops, sde
from sfgrpo.backbones import _adapters
from sfgrpo.backbones._pipeline import PipelineBackbone
from sfgrpo.backbones.base import Conditioning, Negative
from sfgrpo.prompts import images
from sfgrpo.rollout import START, Plan, VelocityField, sample
from sfgrpo.run import records
from tests.support import families
from tests.support.families import FAMILIES, PROMPTS, Family, diffusers

SEED, STEPS = 7, 3


def stock(folder: Path, family: Family) -> Any:
    """The stock pipeline, as its users load it."""
    index: Any = diffusers.DiffusionPipeline.load_config(folder)
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    given = family.given_parts(folder)
    made = getattr(diffusers, family.made)
    # Another class than the folder names is no argument.
    known = {n: part if type(part).__name__ == index[n][1] else None for n, part in given.items()}
    pipeline = made.from_pretrained(folder, **absent, **known)
    pipeline.register_modules(**given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(name: str, folder: Path, **options: Any) -> PipelineBackbone:
    """The backbone of a family, through the path that users take."""
    family = FAMILIES[name]
    given = {
        "max_sequence_length": family.length, "embedded_guidance": family.embedded_guidance,
        **family.options, **options,
    }  # fmt: skip
    backbone: Any = backbones.load(family.backbone, folder, **given)
    return backbone


def encode(
    backbone: Any, family: Family, rows: Sequence[int] = (0, 1), text: str | None = None
) -> Conditioning:
    """Conditioning of some of `PROMPTS` and their images; of a negative text for them, if given."""
    asked = [family.prompts()[row] for row in rows]
    if text is not None:
        asked = [replace(prompt, text=Negative(text)) for prompt in asked]
    return embeddings.encode(backbone, family.size, asked)


def field(
    backbone: PipelineBackbone, family: Family, guidance: float, rows: Sequence[int] = (0, 1)
) -> VelocityField:
    """The velocity for some of `PROMPTS`."""
    return VelocityField(
        backbone=backbone, network=backbone.transformer,
        conditioning=encode(backbone, family, rows),
        unconditional=encode(backbone, family, rows, family.negative) if guidance != 1 else None,
        guidance=guidance, batch_size=8,
    )  # fmt: skip


def ours(backbone: PipelineBackbone, family: Family, guidance: float) -> Tensor:
    """Final latents of `PROMPTS` from our own rollout with the ODE's table, as many at once as the
    stock pipeline makes: other batches round otherwise."""
    shape = backbone.latent_shape(*family.size)
    table = sde.coefficients(backbone.sigmas(STEPS, shape), "ode")
    found = []
    for rows in torch.arange(len(PROMPTS)).split(1 if family.one_by_one else len(PROMPTS)):
        place = torch.arange(len(rows))
        plan = Plan(group_G=rows, prompt_G=place, group_of_M=place, sample_M=rows)
        velocity = field(backbone, family, guidance, rows.tolist())
        made = sample(velocity, table, plan, seed=SEED, latent_shape=shape, methods={})
        found.append(made.states.x_U)
    return torch.cat(found)


def theirs(pipeline: Any, family: Family, noise: Tensor, guidance: float, kind: str) -> Tensor:
    """What the stock pipeline makes from the same noise: final latents ("latent"), or samples in
    [0, 1] ("pt")."""
    height, width, _ = family.size
    start, further = family.given(noise), family.also(pipeline, noise)
    pictures = [[images.opened(source) for source in p.images] for p in family.prompts()]
    takes_length = "max_sequence_length" in inspect.signature(pipeline.__call__).parameters
    length = {"max_sequence_length": family.length} if takes_length else {}
    family.told(pipeline, guidance)

    def part(rows: slice) -> tuple[Tensor, ...]:
        guided = family.guided(guidance) if family.guided else {}
        asked = {k: v[rows] if isinstance(v, list) else v for k, v in guided.items()}
        given = {"latents": start, **further}
        return pipeline(
            prompt=PROMPTS[rows], height=height, width=width, num_inference_steps=STEPS,
            output_type=kind, return_dict=False, **{k: v[rows].clone() for k, v in given.items()},
            **length, **family.stock, **asked, **family.shown(pictures[rows]),
        )  # fmt: skip

    with family.within():
        if family.one_by_one:
            each = [part(slice(row, row + 1))[0] for row in range(len(PROMPTS))]
            made: tuple[Tensor, ...] = (torch.cat(each),)
        else:
            made = part(slice(None))
        if kind == "pt":
            return made[0]
        return family.taken(pipeline, made if further else made[0], noise)


@dataclass(frozen=True)
class Parity:
    """Largest differences between our rollout and the stock pipeline."""

    latents: float
    samples: float
    spread: float
    """Standard deviation of the stock latents, for scale."""


def parity(name: str, folder: Path, guidance: float) -> Parity:
    """`compare` for a pipeline of that family in `folder`."""
    family = FAMILIES[name]
    return compare(family, load(name, folder), stock(folder, family), guidance)


def compare(family: Family, backbone: PipelineBackbone, pipeline: Any, guidance: float) -> Parity:
    """Compare final latents and decoded samples for the same noise, schedule and guidance."""
    shape = backbone.latent_shape(*family.size)
    noise = ops.philox_normal(
        shape, seed=SEED, sample_ids=torch.arange(len(PROMPTS)), step_ids=START
    )
    expected, pictures = (theirs(pipeline, family, noise, guidance, k) for k in ("latent", "pt"))
    found = ours(backbone, family, guidance)
    assert found.shape == expected.shape
    assert backbone.decode(found).shape == pictures.shape
    return Parity(
        latents=float((found - expected).abs().max()),
        samples=float((backbone.decode(found) - pictures).abs().max()),
        spread=float(expected.std()),
    )


def recipe(name: str, folder: Path, out: Path, **changes: str) -> config.Recipe:
    """One iteration of training of a family, small."""
    family = FAMILIES[name]
    height, width, frames = family.size
    prompts = out.parent / f"{out.name}.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in _lines(family, prompts)))
    keys = {
        "model.backbone": family.backbone,
        "model.path": str(folder),
        "model.resolution": str([height, width]),
        "model.num_frames": str(frames),
        "model.max_sequence_length": str(family.length),
        "prompts": str(prompts),
        "reward": "{'tests.support.rewards:Redness': 1}",
        "run": f"{{output_dir: {out}, iterations: 1, seed: 1}}",
        "lora": "{rank: 4, alpha: 8}",
        "sample.num_steps": "4",
        "sample.window": "null",
        "sample.guidance_scale": "3.0" if family.guided else "1.0",
        "sample.embedded_guidance": json.dumps(family.embedded_guidance),
        "sample.prompts_per_iteration": "2",
        "sample.group_size": "3",
        "sample.batch_size": "8",
        "credit.solver": "euler",
        "credit.solver_options": "{substeps: 2}",
        "train.learning_rate": "2e-4",
        "train.updates_per_iteration": "2",
        "train.micro_batch_size": "3",
        "train.beta": "0.01",
        "train.ema_decay": "0.0",
        "eval": "{every: 1, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
        "checkpoint": "{every: 1, keep: 1}",
        **{f"model.{key}": json.dumps(value) for key, value in family.options.items()},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return config.load("embedded", list(keys.items()))


def _lines(family: Family, file: Path) -> list[dict[str, Any]]:
    """What the lines of a prompt file say; the images they name are written beside it."""
    lines = []
    for row, prompt in enumerate(family.prompts()):
        names = [f"{file.stem}-{row}-{k}.png" for k in range(family.images)]
        for name, source in zip(names, prompt.images, strict=True):
            images.opened(source).save(file.with_name(name))
        shown = {"image": names[0] if len(names) == 1 else names} if names else {}
        lines.append({"prompt": prompt.text, **shown})
    return lines


def train(name: str, folder: Path, out: Path, **changes: str) -> tuple[Any, dict[str, Any]]:
    """Run that iteration; the trainer, and its metrics with what moved (largest change of a
    trained parameter)."""
    from sfgrpo.trainer import Trainer

    trainer = Trainer(recipe(name, folder, out, **changes))
    network = trainer.backbone.transformer
    before = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    trainer.train()
    moved = max(  # of what this rank holds whole: nothing at stage 3
        (
            float((p.detach() - before[n]).abs().max())
            for n, p in network.named_parameters()
            if p.requires_grad and p.numel()
        ),
        default=0.0,
    )
    return trainer, {**records.read(out / "metrics.jsonl")[-1], "moved": moved}


def load_export(pipeline: Any, model: Path, *, lora: bool) -> None:
    """Give the stock pipeline what training wrote, as its users would."""
    second = (model / "transformer_2").is_dir()
    if lora and not hasattr(pipeline, "load_lora_weights"):
        pipeline.transformer.load_lora_adapter(str(model), weight_name=_adapters.DIFFUSERS)
        return
    if lora:
        pipeline.load_lora_weights(str(model))
        if second:
            pipeline.load_lora_weights(str(model / "transformer_2"), load_into_transformer_2=True)
        return
    for part in ("transformer", *(["transformer_2"] if second else [])):
        made = type(getattr(pipeline, part))
        setattr(pipeline, part, made.from_pretrained(model / part))


def export(trainer: Any, name: str, folder: Path, out: Path) -> tuple[float, float]:
    """(largest difference between samples of the trained network here and of the stock pipeline
    with the export, how far training moved the stock pipeline's samples)."""
    family, backbone = FAMILIES[name], trainer.backbone
    guidance = 3.0 if family.guided else 1.0
    shape = backbone.latent_shape(*family.size)
    noise = ops.philox_normal(
        shape, seed=SEED, sample_ids=torch.arange(len(PROMPTS)), step_ids=START
    )
    pipeline = stock(folder, family)
    untouched = theirs(pipeline, family, noise, guidance, "pt")
    load_export(pipeline, out / "checkpoints/000001/model", lora=trainer.recipe.lora is not None)
    exported = theirs(pipeline, family, noise, guidance, "pt")
    found = backbone.decode(ours(backbone, family, guidance))
    return float((found - exported).abs().max()), float((exported - untouched).abs().max())


def main() -> None:
    """Print the table."""
    columns = (
        "family", "guidance", "latents", "samples", "reward", "KL", "ratio", "gradient norm",
        "moved", "export",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as place:
        for name, family in FAMILIES.items():
            folder = families.save(name, Path(place) / name)
            guidance = 3.0 if family.guided else 1.0
            found = parity(name, folder, guidance)
            out = Path(place) / f"{name}-run"
            trainer, m = train(name, folder, out)
            difference, change = export(trainer, name, folder, out)
            print(
                f"| {name} | {guidance:g} | {found.latents:.1e} (of {found.spread:.2f}) "
                f"| {found.samples:.1e} | {m['reward']:.4f} | {m['kl']:.1e} "
                f"| {m['ratio_min']:.6f} to {m['ratio_max']:.6f} | {m['grad_norm']:.2e} "
                f"| {m['moved']:.1e} | {difference:.1e} (of {change:.1e}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
