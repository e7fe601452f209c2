"""Is training the same at every ZeRO stage, on any number of ranks? Prints the table.

    python -m benchmarks.trainer.parity [ranks ...]    stage x ranks x weights -> difference

Every case is a whole run of the trainer (sampling, rewards, credit, several micro-batches and
optimiser steps per iteration) from the same start, compared with the run that takes its steps in
plain PyTorch on one process. What rounding alone may change is measured, not assumed: the plain run
once more with other batch and micro-batch sizes, which is the same sum in another order.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from tests.support import ranks

LEARNING_RATE = 1e-3

RECIPE = {
    "reward": "{'tests.support.rewards:Redness': 1}",
    "sample.prompts_per_iteration": "3",
    "sample.group_size": "4",
    "sample.num_steps": "4",
    "sample.window": "null",
    "sample.batch_size": "16",
    "credit.solver": "tweedie",
    "train.learning_rate": str(LEARNING_RATE),
    "train.updates_per_iteration": "2",
    "train.micro_batch_size": "4",
    "train.beta": "0.01",
    "train.ema_decay": "0.5",
    "eval": "{every: 100, prompts: 2, images_per_prompt: 2, num_steps: 2, judges: []}",
    "checkpoint": "{every: 100, keep: 2}",
}
"""Twelve trajectories in groups of four: on two ranks the second group is split. Two noisy steps,
so two updates of 12 rows an iteration: three micro-batches on one rank, two on two."""

RANK, ALPHA = 4, 8
LORA = f"{{rank: {RANK}, alpha: {ALPHA}}}"


@dataclass(frozen=True)
class Case:
    """One run."""

    stage: int = 0
    weights: str = "full"
    dtype: str = "fp32"
    plain: bool = False
    """Plain PyTorch instead of DeepSpeed."""
    resumed: bool = False
    """Stopped after the first iteration, and continued from its checkpoint."""
    begun_by: int = 0
    """The number of ranks, another one, whose same case is `resumed`: its checkpoint of the first
    iteration is continued here."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further keys of the recipe."""

    def __str__(self) -> str:
        stage = "plain" if self.plain else f"ZeRO {self.stage}"
        how = ["resumed"] if self.resumed else []
        how += [f"begun by {self.begun_by}"] if self.begun_by else []
        options = [f"{key.split('.')[1]}={value}" for key, value in self.options.items()]
        return " ".join([stage, self.weights, self.dtype, *how, *options])


@dataclass(frozen=True)
class Outcome:
    """What a run came to, on rank 0."""

    parameters: dict[str, Tensor]
    """fp32, by name."""
    averages: dict[str, Tensor]
    """The averaged weights, as saved."""
    exported: dict[str, Tensor]
    """The same in the folder that the stock pipeline loads, under its names."""
    metrics: list[dict[str, Any]]
    costs: list[dict[str, int]]
    """What each iteration was expected to cost."""
    latents: list[Tensor]
    """`[P N, T + 1, ...]` of each iteration."""
    advantages: list[Tensor]
    """`[P, N, T]` of each iteration."""
    gathered: int
    """Elements of parameters that sampling and scoring gathered."""


def pipeline(folder: Path) -> None:
    """Write a random pipeline with a transformer of 0.1 M parameters, and its prompts."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from sfgrpo.embedded import architecture
    from sfgrpo.embedded.task import DIGIT

    side = DIGIT.height // architecture.REDUCTION
    made = architecture.build_pipeline(0)
    transformer = SD3Transformer2DModel(
        sample_size=side, patch_size=2, num_layers=2,
        in_channels=architecture.LATENT_CHANNELS, out_channels=architecture.LATENT_CHANNELS,
        attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32,
        joint_attention_dim=2 * architecture.TEXT_WIDTH,
        pooled_projection_dim=2 * architecture.TEXT_WIDTH,
        pos_embed_max_size=side // 2, qk_norm="rms_norm",
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    made.register_modules(transformer=transformer)
    made.save_pretrained(folder)
    lines = [f"a white {word} on a red background\n" for word in ("one", "three", "five", "nine")]
    (folder / "prompts.txt").write_text("".join(lines))


def work(argument: tuple[Path, Sequence[Case]]) -> list[Outcome]:
    """Run the cases, one after the other, on the ranks at hand."""
    folder, cases = argument
    torch.set_num_threads(1)
    gathered = _count_gathered()  # before DeepSpeed looks the function up
    # PyTorch computes fp16 on any CPU; DeepSpeed asks for a native one.
    fp16 = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported"
    with patch(fp16, lambda self: True):
        return [_run(folder, case, gathered) for case in cases]


def _count_gathered() -> Counter[str]:
    """From now on counts the elements that DeepSpeed gathers, under "all"."""
    counter: Counter[str] = Counter()
    gather = dist.all_gather_into_tensor

    def counted(output_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        counter["all"] += output_tensor.numel()
        return gather(output_tensor, *arguments, **options)

    dist.all_gather_into_tensor = counted
    return counter


def _run(folder: Path, case: Case, gathered: Counter[str]) -> Outcome:
    from sfgrpo import config, cost, engine, trainer
    from sfgrpo.run import records
    from tests.support.plain import PlainEngine

    latents, advantages = [], []

    class Recorded(trainer.Trainer):
        def draw(self) -> Any:
            gathered["before"] = gathered["all"]
            return super().draw()

        def sample(self, *arguments: Any) -> Any:
            made = super().sample(*arguments)
            latents.append(engine.gather(made.latents_MS, self.layout.numbers()))
            return made

        def score(self, *arguments: Any) -> Any:
            found = super().score(*arguments)
            gathered["sampling"] += gathered["all"] - gathered["before"]
            return found

        def credit(self, *arguments: Any) -> Any:
            advantages.append(super().credit(*arguments))
            return advantages[-1]

    gathered["sampling"] = 0
    world = dist.get_world_size()
    models, out = folder / "pipeline", _place(folder, world, case)
    keys = {
        **RECIPE,
        "model.path": str(models),
        "prompts": str(models / "prompts.txt"),
        "run.output_dir": str(out),
        "lora": LORA if case.weights == "lora" else "null",
        "model.dtype": case.dtype,
        "deepspeed.zero_stage": str(case.stage),
        **case.options,
    }
    if case.begun_by:
        _take(_place(folder, case.begun_by, replace(case, begun_by=0, resumed=True)), out)
    with patch.object(engine, "Engine", PlainEngine if case.plain else engine.Engine):
        for last in ("1", "2") if case.resumed else ("2",):
            keys["run.iterations"] = last
            made = Recorded(config.load("embedded", list(keys.items())))
            made.train()
    parameters = made.engine.masters.whole()
    sigmas = made.backbone.sigmas(made.recipe.sample.num_steps, made.latent_shape)
    checkpoint = out / "checkpoints" / "000002"
    return Outcome(
        parameters=parameters,
        averages=_read(checkpoint / "ema.safetensors"),
        exported={
            n: v for f in checkpoint.glob("model/**/*.safetensors") for n, v in _read(f).items()
        },
        metrics=records.read(out / "metrics.jsonl"),
        costs=[cost.expected(made.recipe, sigmas, world=world).counts() for _ in latents],
        latents=latents,
        advantages=advantages,
        gathered=gathered["sampling"],
    )


def _place(folder: Path, world: int, case: Case) -> Path:
    return folder / f"ranks{world}" / str(case).replace(" ", "-")


def _take(began: Path, out: Path) -> None:
    """Copy the run of other ranks to `out` when its first checkpoint stands there."""
    deadline = time.monotonic() + 600
    while not (began / "checkpoints" / "000001").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint in {began}")
        time.sleep(0.05)
    if dist.get_rank() == 0:
        shutil.copytree(began / "checkpoints" / "000001", out / "checkpoints" / "000001")
        for name in ("recipe.yaml", "metrics.jsonl"):
            shutil.copy(began / name, out / name)
    dist.barrier()


def _read(path: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(path).items()}


def run(
    cases: Mapping[int, Sequence[Case]], *, timeout: float = 1200
) -> dict[int, dict[str, Outcome]]:
    """Outcomes of the cases of each number of ranks, by their names.

    One set of processes serves all cases of a number of ranks; the sets run at the same time, so
    that one can wait for what the other began.
    """

    def start(world: int, folder: Path) -> dict[str, Outcome]:
        # Stage 3 last: from then on DeepSpeed's own linear layers round differently in the process.
        ordered = sorted(cases[world], key=lambda case: (case.stage, case.begun_by))
        results = ranks.run(
            "benchmarks.trainer.parity:work", world, (folder, ordered), timeout=timeout
        )
        return {str(case): found for case, found in zip(ordered, results[0], strict=True)}

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        pipeline(Path(name) / "pipeline")
        running = {world: pool.submit(start, world, Path(name)) for world in cases}
        return {world: found.result() for world, found in running.items()}


def difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of any parameter."""
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Root mean square difference over all parameters."""
    assert one.keys() == two.keys()
    squares = sum(float((one[n] - two[n]).double().square().sum()) for n in one)
    return (squares / sum(v.numel() for v in one.values())) ** 0.5


REORDERED = {"train.micro_batch_size": "7", "sample.batch_size": "5"}
"""The same sums in another order."""


def plain(weights: str, dtype: str) -> list[Case]:
    """The reference, and the reference in another order."""
    return [Case(0, weights, dtype, plain=True, options=o) for o in ({}, REORDERED)]


def main() -> None:
    """Print the table."""
    kinds = [(w, d) for d in ("fp32", "bf16") for w in ("lora", "full")]
    cases = [Case(s, w, d) for w, d in kinds for s in range(4)]
    worlds = [int(world) for world in sys.argv[1:]] or [2]
    references = [case for kind in kinds for case in plain(*kind)]
    found = run({1: [*references, *cases], **dict.fromkeys(worlds, cases)})
    print("Largest (root mean square) difference of any parameter from plain PyTorch on one")
    print(f"process, in learning rates ({LEARNING_RATE}), after 4 optimiser steps:\n")
    print(f"| run | {' | '.join(f'{w} rank(s)' for w in found)} | rounding alone |")
    print("|---" * (len(found) + 2) + "|")
    for case in cases:
        first, other = (found[1][str(c)].parameters for c in plain(case.weights, case.dtype))
        row = [
            f"{difference(p, first) / LEARNING_RATE:.1e} ({distance(p, first) / LEARNING_RATE:.1e})"
            for p in [*(outcomes[str(case)].parameters for outcomes in found.values()), other]
        ]
        print(f"| {case} | {' | '.join(row)} |")


if __name__ == "__main__":  # the module under its own name, which is the one the ranks know
    importlib.import_module("benchmarks.trainer.parity").main()
