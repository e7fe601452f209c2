"""The trainable network, its frozen start and its averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfgrpo.config import Lora


class Policy:
    """A transformer under training.

    With LoRA the reference policy is the same network with its adapters switched off; with full
    weights it is a frozen copy.
    """

    def __init__(
        self, transformer: nn.Module, lora: Lora | None, targets: tuple[str, ...], *, seed: int
    ) -> None:
        self.network = transformer
        self.lora = lora
        if lora is None:
            self._reference = copy.deepcopy(transformer).requires_grad_(False).eval()
            transformer.requires_grad_(True)
        else:
            transformer.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # LoRA's A matrices: the same on every rank
                transformer.add_adapter(  # pyright: ignore[reportCallIssue]
                    LoraConfig(
                        r=lora.rank,
                        lora_alpha=lora.alpha,
                        init_lora_weights="gaussian",
                        target_modules=list(targets),
                    )
                )

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network as it was before training, without gradient."""
        with torch.no_grad():
            if self.lora is None:
                yield self._reference
                return
            self.network.disable_adapters()  # pyright: ignore[reportCallIssue]
            try:
                yield self.network
            finally:
                self.network.enable_adapters()  # pyright: ignore[reportCallIssue]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}


class Ema:
    """Exponential moving average of the trained parameters, in fp32."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * parameters, after an optimiser step."""
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the network carries the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, path: Path) -> None:
        """Write the averages as safetensors."""
        save_file(self.average, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        for name, value in load_file(path).items():
            self.average[name].copy_(value)
