"""A generator whose velocity is known in closed form, for tests of everything above the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfgrpo.backbones.base import Conditioning, Modality


class PointVelocity(nn.Module):
    """All data of prompt p at one point c_p: v(x, t) = (x - c_p) / t, plus a nonlinear bend."""

    def __init__(self, bend: float = 0.0) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, centre: Tensor) -> Tensor:
        self.rows.append(len(x))
        t = t.view(-1, 1, 1, 1)
        return (x - centre.view(-1, 1, 1, 1)) / t + self.bend * torch.sin(3 * x) * t


class PointBackbone:
    """Prompts are numbers: the point where their data lie. "" is 0."""

    device = torch.device("cpu")
    dtype = torch.float32
    lora_targets = ()
    modality: Modality = "image"
    decode_batch = 64

    def __init__(self, bend: float = 0.0) -> None:
        self.transformer = PointVelocity(bend)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return 3, height, width

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        centre = torch.tensor([[float(p or 0)] for p in prompts])
        return Conditioning(tokens=centre)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return transformer(x, t, cond.tokens[:, 0])

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return v, v_uncond

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.transformer.state_dict(), folder / "model.safetensors")

    def restore(self, folder: Path) -> None:
        self.transformer.load_state_dict(load_file(folder / "model.safetensors"))

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 4 + 0.5).clamp(0, 1)
