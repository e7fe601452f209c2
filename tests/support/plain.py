"""What the engine must equal: one process, PyTorch's AdamW, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from sfgrpo.config import Recipe


class PlainMasters:
    """fp32 copies of the trained parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.shares = [p.detach().float().clone() for p in parameters.values()]

    def write(self, values: list[Tensor]) -> None:
        for share, value in zip(self.shares, values, strict=True):
            share.detach().copy_(value)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, share in zip(self.parameters.values(), self.shares, strict=True):
            parameter.copy_(share)

    def assign(self, values: Mapping[str, Tensor]) -> None:
        self.write([values[name] for name in self.parameters])

    def whole(self) -> dict[str, Tensor]:
        return {n: s.clone() for n, s in zip(self.parameters, self.shares, strict=True)}


class PlainEngine:
    """Takes the place of `sfgrpo.engine.Engine`."""

    pace = None

    def __init__(self, network: nn.Module, recipe: Recipe, *, micro_batches: int) -> None:
        parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.network, self.micro_batches, self.norm = network, micro_batches, 0.0
        self.max_norm = recipe.train.max_grad_norm
        self.masters = PlainMasters(parameters)
        self.gradients = [torch.zeros_like(share) for share in self.masters.shares]
        self.optimizer = torch.optim.AdamW(
            self.masters.shares, lr=recipe.train.learning_rate, betas=recipe.train.betas,
            weight_decay=recipe.train.weight_decay,
        )  # fmt: skip
        self.accumulated = 0

    def row_weight(self, local_rows: int) -> float:
        return self.micro_batches / local_rows

    def backward(self, loss: Tensor) -> bool:
        parameters = list(self.masters.parameters.values())
        found = torch.autograd.grad(loss / self.micro_batches, parameters, allow_unused=True)
        for total, gradient in zip(self.gradients, found, strict=True):
            if gradient is not None:
                total += gradient.float()
        self.accumulated += 1
        if self.accumulated % self.micro_batches:
            return False
        for share, gradient in zip(self.masters.shares, self.gradients, strict=True):
            share.grad = gradient.clone()
            gradient.zero_()
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.masters.shares, self.max_norm))
        self.optimizer.step()
        self.masters.publish()
        return True

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def grad_norm(self) -> float:
        return self.norm

    def loss_scale(self) -> float:
        return 1.0

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def exporting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
