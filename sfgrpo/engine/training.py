"""A network under training: forward, accumulate, step, save, load, at any ZeRO stage."""

from __future__ import annotations

import copy
import glob
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from sfgrpo import zero
from sfgrpo.config import Recipe
from sfgrpo.engine import configuration, processes, sharded
from sfgrpo.engine.masters import Masters
from sfgrpo.engine.processes import barrier, largest, rank
from sfgrpo.engine.resharding import Layout, Saved
from sfgrpo.engine.stored import Files


def frozen(network: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `network` that only predicts, held as the recipe's stage holds parameters: sharded
    at 3, where the copy is of no more than one parameter at a time."""
    if not zero.shards_parameters(recipe):
        return copy.deepcopy(network).requires_grad_(False).eval()
    start = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    sharded.shard(start, recipe)  # gives it parameters of its own
    start.requires_grad_(False).eval()
    settings = configuration.inference(recipe, start)
    settings["zero_optimization"].pop("offload_optimizer")
    precise = Precise(start, weights=False)
    engine, *_ = deepspeed.initialize(model=start, config=settings, dist_init_required=False)
    precise.restore()
    return engine


class Precise:
    """What a network keeps in fp32 while the rest of it runs in half precision.

    DeepSpeed casts a network whole, also what diffusers leaves in fp32 on purpose: buffers such as
    Wan's rotary tables, and norms and time embeddings. Those that are not trained are put back.
    """

    def __init__(self, network: nn.Module, *, weights: bool) -> None:
        """Remember the fp32 buffers of `network` and, with `weights`, its frozen fp32 weights."""
        wide = (torch.float32, torch.float64)
        self._weights = [
            (p, p.detach())
            for p in network.parameters()
            if weights and not p.requires_grad and p.dtype in wide
        ]
        self._buffers = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype in wide
        ]

    def restore(self) -> None:
        """Put them back where they have been cast."""
        for parameter, value in self._weights:
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        for module, name, value in self._buffers:
            found = module._buffers[name]
            if found is not None and found.dtype != value.dtype:
                module._buffers[name] = value.to(found.device)


class Engine:
    """A network under training."""

    def __init__(self, network: nn.Module, recipe: Recipe, *, micro_batches: int) -> None:
        """Shard what the recipe says; `micro_batches` of each rank make an optimiser step."""
        self.trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.micro_batches, self._context = micro_batches, recipe.model.context_parallel
        self.stage, self.shards_parameters = zero.stage(recipe), zero.shards_parameters(recipe)
        once = sharded.gathers_once(recipe.deepspeed.gather_for_sampling, network)
        self._gathers = self.shards_parameters and once
        self._saved = self.trainable if recipe.lora else dict(network.named_parameters())
        self._own_norm: Tensor | None = None
        precise = Precise(network, weights=not self.shards_parameters)
        self.network: Any
        self.network, *_ = deepspeed.initialize(
            model=network,
            model_parameters=list(self.trainable.values()),  # pyright: ignore[reportArgumentType]
            config=configuration.training(recipe, network, micro_batches),
            dist_init_required=False,
        )
        self.network.checkpoint_engine = Files(self.network._config)
        precise.restore()
        self.masters = Masters(self.network.optimizer, self.trainable)

    def row_weight(self, local_rows: int) -> float:
        """Weight of one row that makes `backward` and `step` optimise the mean over all rows.

        DeepSpeed takes the mean over ranks. Those of a context group have the same rows, and each a
        part of their gradients: what is wanted of the group is the sum.
        """
        return self._context * self.micro_batches / local_rows

    def backward(self, loss: Tensor) -> bool:
        """Accumulate one micro-batch; the last of them takes the optimiser step.

        Returns whether a step was taken: not between micro-batches, and not when the gradient was
        not finite on some rank.
        """
        if self.network.is_gradient_accumulation_boundary():
            barrier()  # waiting for slower ranks shall not pass for communication
        self.network.backward(loss)
        if self.network.is_gradient_accumulation_boundary():
            self._own_norm = self._norm_before_step()
            if self._own_norm is not None and not self._own_norm.isfinite():
                return False  # stage 0 would step regardless; the others check by themselves
        self.network.step()
        return self.network.was_step_applied()

    def set_learning_rate(self, rate: float) -> None:
        """That of the optimiser steps from now on."""
        for group in self.network.optimizer.param_groups:
            group["lr"] = rate

    def grad_norm(self) -> float:
        """Norm of the whole gradient at the last step taken, before clipping and loss scale."""
        norm = self.network.get_global_grad_norm() if self._own_norm is None else self._own_norm
        return float(norm)

    def loss_scale(self) -> float:
        """What the loss of the next micro-batch is multiplied with; 1 except in fp16."""
        return float(getattr(self.network.optimizer, "loss_scale", 1.0))

    def _norm_before_step(self) -> Tensor | None:
        """What DeepSpeed does not report where a plain PyTorch optimiser steps (stage 0);
        the gradients have been averaged over ranks by then."""
        if not self.masters.whole_here:
            return None
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def sampling(self) -> AbstractContextManager[None]:
        """Within the context the network may be run often; its weights must not change."""
        return sharded.gathered(self.network) if self._gathers else nullcontext()

    @property
    def pace(self) -> Callable[[int], int] | None:
        """From the number of forwards of this rank to that of the rank that has most of them,
        if forwards communicate (stage 3, gathering layer by layer); every rank must call it."""
        return largest if self.shards_parameters and not self._gathers else None

    def exporting(self) -> AbstractContextManager[None]:
        """Within the context rank 0 finds the trained weights whole in the network's state."""
        if not self.shards_parameters:
            return nullcontext()
        return sharded.whole_state(self.network.module, self._saved)

    def save(self, folder: Path) -> None:
        """Write parameters and optimiser state of every rank into `folder`."""
        self.network.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; pickle.UnpicklingError if it holds more than data.

        DeepSpeed takes the path for a pattern: `runs/s[1]` would load what `runs/s1` holds.
        """
        if glob.has_magic(str(folder)):
            with tempfile.TemporaryDirectory(prefix="sfgrpo-") as plain:
                link = Path(plain) / "checkpoint"
                link.symlink_to(folder.absolute(), target_is_directory=True)
                self.network.load_checkpoint(str(link), tag="engine", load_module_strict=False)
        else:
            self.network.load_checkpoint(str(folder), tag="engine", load_module_strict=False)

    def load_anew(self, folder: Path, *, stage: int, world: int) -> None:
        """Read what `save` wrote at another ZeRO stage or on another number of ranks, 1 to 3 both;
        as `load` does otherwise. Every rank must call it."""
        optimizer = self.network.optimizer
        saved = Saved(folder / "engine", self.network.checkpoint_engine, stage=stage, world=world)
        shapes = self.network._get_zero_param_shapes()
        groups = [{name: shape.numel() for name, shape in group.items()} for group in shapes]
        layout = Layout(self.stage, processes.world(), groups)
        if self.shards_parameters:
            optimizer.checkpoint_event_prologue()
        states: list[Any] = [None] * layout.world
        states[rank()] = saved.state(optimizer.state_dict(), layout, rank())
        optimizer.load_state_dict(states, load_from_fp32_weights=True)
        if self.shards_parameters:
            optimizer.checkpoint_event_epilogue()
        buffers = {name: saved.network["module"][name] for name in saved.network["buffer_names"]}
        self.network.module.load_state_dict(buffers, strict=False)
        for count in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self.network, count, saved.network[count])
        self.masters.publish()
