"""Which SDE leaves the cleaner samples: single ones of each against the ODE's of the same noise.

    python -m benchmarks.claims.sde_samples --out benchmarks/results/sde_samples_cpu.json

Samplers are compared as published, and at equal exploration: the stochasticity of each is chosen so
that the mean of |x_next - mean| over the steps is that of DDIM-SDE at some etas. Measured are the
reward, how far below the ODE's it is, and the images' energy at high frequencies (beyond half of
the Nyquist frequency), which is what leftover noise looks like. No network is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfgrpo import config, evaluate, files, sde, standing
from sfgrpo.rollout import batches, sample
from sfgrpo.score import measure
from sfgrpo.standing import Standing

REFERENCE = "ddim"
SAMPLERS = ("ddim", "flow", "dance", "cps", "precise")
ETAS = (0.35, 0.7, 0.9)
"""Of the reference; the paper's is 0.7."""
PUBLISHED = {"flow": 0.7, "dance": 0.3, "ddim": 0.7, "cps": 0.7}
"""The stochasticity that each is usually run with: Flow-SDE explores far more than the others."""
RESAMPLED = 2000
"""Bootstrap samples of an interval, over prompts."""


def exploration(sigmas: Tensor, sampler: str, eta: float) -> float:
    """Mean of |x_next - mean| over the steps: a normal number's is sqrt(2 / pi) deviations."""
    noise = sde.coefficients(sigmas, sampler, eta)[:, 2].double()
    return float(noise.mean()) * math.sqrt(2 / math.pi)


def eta_of(sigmas: Tensor, sampler: str, wanted: float) -> float:
    """The eta at which a sampler explores so much, by bisection.

    Raises:
        ValueError: it cannot explore so much; its last step holds no more noise.
    """

    def enough(eta: float) -> bool:
        try:
            return exploration(sigmas, sampler, eta) >= wanted
        except ValueError:  # more noise than a step can hold
            return True

    low, high = 0.0, 0.05
    while high < 10 and not enough(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    if abs(exploration(sigmas, sampler, low) - wanted) > 1e-6:
        raise ValueError(f"'{sampler}' reaches {exploration(sigmas, sampler, low):.4f} only")
    return low


def high_frequencies(images: Tensor) -> Tensor:
    """Energy beyond half of the Nyquist frequency, a pixel, of images [B, 3, H, W]."""
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean(1)
    rows, columns = (torch.fft.fftfreq(size).abs() for size in images.shape[-2:])
    beyond = torch.maximum(rows[:, None], columns[None, :]) > 0.25
    return (spectrum * beyond).mean((-2, -1))


@torch.no_grad()
def samples(policy: Standing, table: Tensor, images: int, seed: int) -> dict[str, Tensor]:
    """Numbers `[P, N]` of one sample from each of `images` starting points of every prompt."""
    plan = evaluate.held_out_plan(len(policy.prompts), images, policy.field.backbone.device)
    made = sample(
        policy.field, table, plan, seed=seed, latent_shape=policy.latent_shape, methods={}
    )
    found: dict[str, list[Tensor]] = {}
    for few in batches(len(plan.sample_M), policy.field.backbone.decode_batch):
        decoded = policy.field.backbone.decode(made.states.x_U[few])
        scores = measure(policy.reward, decoded, plan.prompt_G[few], policy.prompts)
        for name, values in {**scores, "high_frequencies": high_frequencies(decoded)}.items():
            found.setdefault(name, []).append(values.double().cpu())
    return {name: torch.cat(v).unflatten(0, (-1, images)) for name, v in found.items()}


def with_interval(values_P: Tensor) -> list[float]:
    """Mean over prompts, and its bootstrap interval of 95 %."""
    draw, values = np.random.default_rng(0), values_P.numpy()
    means = values[draw.integers(len(values), size=(RESAMPLED, len(values)))].mean(1)
    return [float(x) for x in (values.mean(), *np.quantile(means, [0.025, 0.975]))]


def compared(found: dict[str, Tensor], ode: dict[str, Tensor]) -> dict[str, Any]:
    """What is reported of a sampler."""
    energy = found["high_frequencies"].mean(1) / ode["high_frequencies"].mean(1)
    return {
        "reward": with_interval(found["reward"].mean(1)),
        "below the ODE": with_interval((ode["reward"] - found["reward"]).mean(1)),
        "high frequencies, of the ODE's": with_interval(energy),
    }


def run(policy: Standing, images: int, seeds: Sequence[int]) -> dict[str, Any]:
    """All samplers at all etas."""
    steps = policy.recipe.sample.num_steps
    sigmas = policy.field.backbone.sigmas(steps, policy.latent_shape)

    def measured(sampler: str, eta: float) -> dict[str, Tensor]:
        table = sde.coefficients(sigmas, sampler, eta)
        parts = []
        for seed in seeds:
            parts.append(samples(policy, table, images, seed))
            bar.update()
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    runs = 1 + len(PUBLISHED) + len(ETAS) * len(SAMPLERS)
    with tqdm(total=len(seeds) * runs, unit="sampling") as bar:
        ode, rows = measured("ode", 0.0), list[dict[str, Any]]()
        for sampler, eta in PUBLISHED.items():
            found = compared(measured(sampler, eta), ode)
            explored = exploration(sigmas, sampler, eta)
            rows.append({"exploration": explored, "sampler": sampler, "eta": eta, **found})
        for reference in ETAS:
            wanted = exploration(sigmas, REFERENCE, reference)
            for sampler in SAMPLERS:
                row: dict[str, Any] = {"exploration": wanted, "sampler": sampler}
                try:
                    row["eta"] = eta_of(sigmas, sampler, wanted)
                    row |= compared(measured(sampler, row["eta"]), ode)
                except ValueError as error:
                    row["why not"] = str(error)
                    bar.update(len(seeds))
                rows.append(row)
    return {"ode": compared(ode, ode), "rows": rows}


def told(found: dict[str, Any]) -> str:
    """The table."""
    lines = ["| exploration | sampler | eta | reward below the ODE's | high frequencies |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in found["rows"]:
        start = f"| {row['exploration']:.3f} | {row['sampler']} | "
        if "why not" in row:
            lines.append(f"{start}{row['why not']} | | |")
            continue
        below, energy = row["below the ODE"], row["high frequencies, of the ODE's"]
        lines.append(
            f"{start}{row['eta']:.3f} | {below[0]:.4f} ({below[1]:.4f} to {below[2]:.4f}) | "
            f"{energy[0]:.2f} ({energy[1]:.2f} to {energy[2]:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print; keep the numbers where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims.sde_samples", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--recipe", default="embedded", help="default: embedded")
    parser.add_argument("--prompts", type=int, default=46, help="default: 46")
    parser.add_argument("--images", type=int, default=2, help="of a prompt and seed (default: 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    recipe = config.load(options.recipe)
    policy = standing.prepare(
        recipe, lambda split: evaluate.chosen(split.evaluation, options.prompts)
    )
    found = run(policy, options.images, options.seeds)
    print(told(found))
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, check=False).stdout.strip()  # fmt: skip
        asked = {name: value for name, value in vars(options).items() if name != "out"}
        head = {"command": "python -m benchmarks.claims.sde_samples", **asked, "commit": commit}
        files.write(options.out, json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
