"""A velocity network of one's own (a robot's policy, molecules) as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfgrpo.backbones import _adapters, _weights
from sfgrpo.backbones.base import Conditioning, Modality

SAVED = "network.safetensors"


class ModuleBackbone:
    """A plain module `network(x [B, *shape], t [B], condition [B, ...]) -> velocity [B, *shape]`.

    Convention: data at t = 0, noise at t = 1, velocity = noise - data. A model trained the other
    way round wants a wrapper that passes 1 - t and negates the result.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        shape: tuple[int, ...],
        encode: Callable[[Sequence[str]], Tensor],
        decode: Callable[[Tensor], Tensor] = lambda latents: latents,
        sigmas: Callable[[int], Tensor] = lambda steps: torch.linspace(
            1, 0, steps + 1, dtype=torch.float32, device="cpu"
        ),
        lora_targets: tuple[str, ...] = (),
        modality: Modality = "other",
        decode_batch: int = 1024,
    ) -> None:
        """Wrap `network`.

        Args:
            shape: of one sample, e.g. (16, 7) for sixteen actions of seven joints.
            encode: the lines of the prompt file -> one condition [P, ...] each ("" is the
                unconditional one, asked for under guidance alone).
            decode: samples -> what the rewards get.
            sigmas: number of steps -> times [steps + 1] descending from 1 to 0.
            lora_targets: names of linear layers; needed if the recipe's `lora` is not null.
        """
        for name, value in network.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the network's state holds '{name}', a {type(value).__name__}: safetensors "
                    "keep tensors alone, so no checkpoint could be written; let get_extra_state "
                    "return one"
                )
        self.transformer, self.shape = network, shape
        self.lora_targets, self.modality = lora_targets, modality
        self.decode_batch = decode_batch
        self._encode, self._decode, self._sigmas = encode, decode, sigmas

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.shape

    def sigmas(self, num_steps: int, latent_shape: tuple[int, ...]) -> Tensor:
        return self._sigmas(num_steps).float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(tokens=self._encode(prompts)).to(self.device, self.dtype)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return transformer(x.to(self.dtype), t.to(self.dtype), cond.tokens).float()

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return v, v_uncond

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._decode(latents)

    def save(self, folder: Path) -> None:
        """Write `network.safetensors`: all weights, or under LoRA the adapters alone, of full
        strength: a layer adds B A x."""
        if adapters := _adapters.of(self.transformer):
            state = _adapters.at_full_strength(*adapters)
        else:
            state = self.transformer.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        # Each name has a copy of its own: tied weights share memory, which safetensors refuse.
        copies = {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in state.items()
        }
        save_file(copies, folder / SAVED)

    def restore(self, folder: Path) -> None:
        _weights.restore(self.transformer, folder, parts={"": SAVED}, adapters=SAVED)
