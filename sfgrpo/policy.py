"""The trainable network, its frozen start and its averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfgrpo import engine
from sfgrpo.backbones import _adapters, _context
from sfgrpo.config import Lora, Recipe


class Policy:
    """A transformer under training.

    With LoRA the reference policy is the same network with its adapters switched off; with full
    weights it is a frozen copy. At ZeRO stage 3 both are sharded from here on, and with
    `model.context_parallel` the ranks of a group share their sequences.
    """

    def __init__(self, transformer: nn.Module, recipe: Recipe, targets: tuple[str, ...]) -> None:
        self.network = transformer
        self.lora = lora = recipe.lora
        networks = [transformer]
        if lora is None and recipe.train.beta:
            self._reference = engine.frozen(transformer, recipe)
            networks.append(self._reference)
        engine.shard(transformer, recipe)
        if lora is None:
            transformer.requires_grad_(True)
        else:
            transformer.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.run.seed)  # LoRA's A matrices: the same on every rank
                add_lora(transformer, lora, targets)
            if lora.path is not None:
                _adapters.load(transformer, lora.path, rank=lora.rank, alpha=lora.alpha)
        self._adapters = [] if lora is None else _layers(transformer)
        for network in networks:
            _context.share(network, recipe.model.context_parallel)

    def checkpoint_gradients(self) -> None:
        """Let the backward pass compute activations again instead of keeping them.

        ValueError for a network that has no `enable_gradient_checkpointing` (diffusers' have)."""
        enable = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"train.gradient_checkpointing: {type(self.network).__name__} has no method "
                "enable_gradient_checkpointing; use false, or give it one"
            )
        enable()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network as it was before training, without gradient."""
        with torch.no_grad():
            if self.lora is None:
                yield self._reference
                return
            for layer in self._adapters:
                layer.enable_adapters(False)
            try:
                yield self.network
            finally:
                for layer in self._adapters:
                    layer.enable_adapters(True)


def check_start(lora: Lora | None) -> None:
    """ValueError if the adapters that training is to start from are not there or of another rank;
    said before the network is loaded."""
    if lora is not None and lora.path is not None:
        _adapters.check(lora.path, lora.rank)


def add_lora(network: nn.Module, lora: Lora, targets: Sequence[str]) -> None:
    """Put adapters, alone to be trained, on the linear layers whose names end as `targets` do.

    Raises:
        ValueError: no layer of the network is called so, or the rank is more than any of them has.
    """
    targets = lora.targets or targets
    if not targets:
        raise ValueError(
            "lora.targets: this backbone names no layers for adapters; name some, or use "
            "`lora: null` to train all weights"
        )
    _check_rank(network, lora.rank, targets)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian",
        target_modules=list(targets),
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ValueError(f"lora.targets: {error}") from error


def _check_rank(network: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Refuse a rank that is more than every layer's smaller side, which costs memory and buys
    nothing. Layers narrower than the rank beside one that is not are common."""
    layers = [
        (min(module.in_features, module.out_features), name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{t}" for t in targets))
    ]
    if not layers:
        return  # peft says what is wrong with the names, or knows layers of other kinds
    widest, name, module = max(layers, key=lambda layer: layer[0])
    if rank > widest:
        raise ValueError(
            f"lora.rank: {rank} is more than {widest}, the smaller side of the widest layer that "
            f"gets adapters ('{name}', {module.in_features} x {module.out_features}): use at most "
            f"{widest}, or `lora: null` to train all weights"
        )


def _layers(network: nn.Module) -> list[Any]:
    """The adapted layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


class Masters(Protocol):
    """What is averaged: the trained values in fp32, of which this rank may hold a share."""

    @property
    def shares(self) -> list[Tensor]:
        """This rank's values, as they are now."""
        ...

    def write(self, values: list[Tensor]) -> None:
        """Replace them, and the weights of the network with them."""
        ...

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Replace them by this rank's share of whole parameters; leaves the network alone."""
        ...


class Ema:
    """Exponential moving average of the trained values; each rank averages its own share."""

    def __init__(self, masters: Masters, decay: float) -> None:
        self.masters = masters
        self.decay = decay
        self.average = self._copy()

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * values, after an optimiser step."""
        for average, value in zip(self.average, self.masters.shares, strict=True):
            average.lerp_(value.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the network carries the averaged weights."""
        kept = [value.clone() for value in self.masters.shares]
        self.masters.write(self.average)
        try:
            yield
        finally:
            self.masters.write(kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from averages saved whole."""
        kept = [value.clone() for value in self.masters.shares]
        self.masters.assign(values)
        self.average = self._copy()
        self.masters.write(kept)

    def _copy(self) -> list[Tensor]:
        return [value.detach().float().clone() for value in self.masters.shares]
